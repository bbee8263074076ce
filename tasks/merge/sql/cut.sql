-- Exact ranks at wanted places of the selection order: only the buckets (first 16 bits of the
-- rank) that hold a wanted place are sorted.
WITH wanted AS (
  SELECT unnest($buckets::INTEGER[]) AS bucket, unnest($places::BIGINT[]) AS place
),
placed AS (
  SELECT bucket, rank, row_number() OVER (PARTITION BY bucket ORDER BY rank) AS place
  FROM (
    SELECT rank::UUID AS rank, ('0x' || left(rank::VARCHAR, 4))::INTEGER AS bucket
    FROM read_parquet($paths, hive_partitioning = false)
  )
  WHERE list_contains($buckets::INTEGER[], bucket)
)
SELECT rank::VARCHAR FROM placed JOIN wanted USING (bucket, place) ORDER BY rank
