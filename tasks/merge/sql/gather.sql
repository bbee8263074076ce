-- The selected rows of one metadata file, each with the range of the selection order it is in.
WITH ranges AS (
  SELECT unnest($last_ranks::VARCHAR[])::UUID AS last_rank,
    unnest(range(len($last_ranks::VARCHAR[]))) AS part
),
selected AS (
  SELECT kept.row_in_file, kept.rank, kept.others, kept.as_is, ranges.part
  FROM (
    SELECT row_in_file, rank::UUID AS rank, others, as_is
    FROM read_parquet($kept, hive_partitioning = false)
  ) AS kept
  ASOF JOIN ranges ON kept.rank <= ranges.last_rank
  WHERE $after::VARCHAR IS NULL OR kept.rank > $after::UUID
),
published AS (
  SELECT selected.row_in_file, selected.rank, selected.others, selected.as_is, selected.part,
    {columns}
  FROM {rows} AS row_of_file
  JOIN selected ON row_of_file.file_row_number = selected.row_in_file
),
{normalise}
SELECT
  $source::VARCHAR AS source,
  url,
  caption,
  original_id,
  similarity,
  width AS width_hint,
  height AS height_hint,
  CASE WHEN others = 0 THEN '' ELSE array_to_string(
    list_filter($names::VARCHAR[], lambda name, place: (others >> (place - 1)) & 1 = 1), ','
  ) END AS also_in,
  rank,
  part
FROM normalised
