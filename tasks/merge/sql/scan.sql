-- One metadata file: of every row that passes what the output needs, of every other row the first
-- rule it fails; of rows on a blocklist also the entries that they may match (`listed`). The key is
-- what duplicates share and, as the seed is in it, also the place in the selection order.
WITH published AS (
  SELECT file_row_number AS row_in_file,
    {columns}
  FROM {rows} AS row_of_file
),
{normalise},
judged AS (
  SELECT *, {reason} AS reason FROM normalised
)
SELECT
  row_in_file,
  reason,
  CASE WHEN reason IS NULL THEN md5($seed::VARCHAR || ':' || address)::UUID END AS key,
  CASE WHEN reason IS NULL THEN url END AS url,
  CASE WHEN reason IS NULL THEN caption END AS caption,
  CASE WHEN reason IS NULL AND $keeps_hash THEN image_hash END AS image_hash,
  original_id,
  similarity,
  width AS width_hint,
  height AS height_hint,
  {listed} AS listed
FROM judged
