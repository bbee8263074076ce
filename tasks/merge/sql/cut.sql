-- Exact keys at wanted places of the selection order: only the buckets (first 16 bits of the key)
-- that hold a wanted place are sorted.
WITH wanted AS (
  SELECT unnest($buckets::INTEGER[]) AS bucket, unnest($places::BIGINT[]) AS place
),
placed AS (
  SELECT bucket, key, row_number() OVER (PARTITION BY bucket ORDER BY key) AS place
  FROM (
    SELECT key::UUID AS key, bucket
    FROM read_parquet($paths, hive_partitioning = false)
    WHERE source = $source
  )
  WHERE list_contains($buckets::INTEGER[], bucket)
)
SELECT key::VARCHAR FROM placed JOIN wanted USING (bucket, place) ORDER BY key
