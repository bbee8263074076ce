-- One range of a source's selection order, sorted; uid = md5 of address and caption.
SELECT
  md5(substr(url, strpos(url, '://') + 3) || chr(10) || caption) AS uid,
  $name::VARCHAR AS source,
  url,
  caption,
  original_id,
  similarity,
  width_hint,
  height_hint,
  CASE WHEN others = 0 THEN '' ELSE array_to_string(
    list_filter($names::VARCHAR[], lambda name, place: (others >> (place - 1)) & 1 = 1), ','
  ) END AS also_in
FROM (
  SELECT * FROM read_parquet($rows, hive_partitioning = false)
  WHERE key <= $last::UUID {after}
)
JOIN (
  SELECT key::UUID AS key, file, row_in_file, others
  FROM read_parquet($kept, hive_partitioning = false)
  WHERE source = $source
) USING (key, file, row_in_file)
ORDER BY key
