-- One file of a cleaned edition: the key of every address it has, by partition.
WITH published AS (
  SELECT {url} AS raw_url, NULL::VARCHAR AS raw_caption
  FROM read_parquet($path, hive_partitioning = false)
),
{normalise}
SELECT DISTINCT hash::UUID AS key, (('0x' || left(hash, 4))::INTEGER * $partitions) >> 16 AS part
FROM (SELECT md5($seed::VARCHAR || ':' || address) AS hash FROM normalised)
WHERE hash IS NOT NULL
