-- One range of the selection order, sorted; uid = md5 of address and caption.
SELECT md5(substr(url, strpos(url, '://') + 3) || chr(10) || caption) AS uid, source, url, caption,
  original_id, similarity, width_hint, height_hint, also_in
FROM read_parquet($paths, hive_partitioning = false)
ORDER BY rank
