-- Every entry of the table `listed`, in its order, with how many rows of all partitions hold it and
-- the first 64 bits of its MD5.
SELECT listed.number, entry, coalesce(sum(held.rows), 0)::BIGINT AS rows,
  ('0x' || left(md5(entry), 16))::UBIGINT AS hash
FROM read_parquet($listed, hive_partitioning = false) AS listed
LEFT JOIN read_parquet($held, hive_partitioning = false) AS held USING (number)
GROUP BY listed.number, entry
ORDER BY listed.number
