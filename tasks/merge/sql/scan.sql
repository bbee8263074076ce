-- One metadata file: every row that passes, ready to be written, with its partition; of every other
-- row the first rule it fails (part -1). The key is what duplicates share and, as the seed is in
-- it, also the place in the selection order; a partition is a range of keys.
WITH published AS (
  SELECT file_row_number AS row_in_file,
    {columns}
  FROM {rows} AS row_of_file
),
{normalise},
judged AS (
  SELECT *, md5($seed::VARCHAR || ':' || address) AS hash,
    {reason} AS reason
  FROM normalised
)
SELECT
  $source::INTEGER AS source,
  $file::INTEGER AS file,
  row_in_file,
  reason,
  CASE WHEN reason IS NULL THEN hash::UUID END AS key,
  CASE WHEN reason IS NULL THEN url END AS url,
  CASE WHEN reason IS NULL THEN caption END AS caption,
  original_id,
  similarity,
  width AS width_hint,
  height AS height_hint,
  CASE WHEN reason IS NULL THEN (('0x' || left(hash, 4))::INTEGER * $partitions) >> 16 ELSE -1
    END AS part
FROM judged
