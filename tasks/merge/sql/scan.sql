-- One metadata file: every row with its partition, or with the first rule it fails (part -1).
WITH published AS (
  SELECT file_row_number AS row_in_file,
    {columns}
  FROM {rows} AS row_of_file
),
{normalise},
judged AS (
  SELECT *, md5(address) AS hash,
    {reason} AS reason
  FROM normalised
)
SELECT
  $source::INTEGER AS source,
  $file::INTEGER AS file,
  reason,
  CASE WHEN reason IS NULL THEN row_in_file END AS row_in_file,
  CASE WHEN reason IS NULL THEN hash::UUID END AS key,
  CASE WHEN reason IS NULL THEN similarity END AS similarity,
  CASE WHEN reason IS NULL THEN original_id END AS original_id,
  CASE WHEN reason IS NULL THEN is_normal AND is_tidy END AS as_is,
  CASE WHEN reason IS NULL THEN ('0x' || left(hash, 4))::INTEGER % $partitions ELSE -1 END AS part
FROM judged
