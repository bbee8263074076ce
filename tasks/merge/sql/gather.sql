-- The selected rows of one metadata file, each with the range of the selection order it is in.
WITH ranges AS (
  SELECT unnest($last_ranks::VARCHAR[])::UUID AS last_rank,
    unnest(range(len($last_ranks::VARCHAR[]))) AS part
),
selected AS (
  SELECT kept.row_in_file, kept.rank, ranges.part
  FROM read_parquet($kept, hive_partitioning = false) AS kept
  ASOF JOIN ranges ON kept.rank <= ranges.last_rank
),
published AS (
  SELECT selected.row_in_file, selected.rank, selected.part,
    {columns}
  FROM read_parquet($path, file_row_number = true, hive_partitioning = false) AS row_of_file
  JOIN selected ON row_of_file.file_row_number = selected.row_in_file
),
{normalise}
SELECT
  md5(address || chr(10) || caption) AS uid,
  $source::VARCHAR AS source,
  url,
  caption,
  original_id,
  similarity,
  width AS width_hint,
  height AS height_hint,
  rank,
  part
FROM normalised
