-- One partition: which rows stay. For each entry that a row holds there is a draw from [0, 1), a hash
-- of its uid and the entry (64 bits mixed as SplitMix64 ends); it stays when the draw times the rows
-- that hold the entry is less than `$t` for one of them: all rows of an entry that no more than
-- `$t` hold, about `$t` of any other, and at a smaller `$t` some of the same.
CREATE OR REPLACE TEMP TABLE deduped AS
WITH mixed_0 AS (
  SELECT row, rows, xor(uid, hash) AS bits
  FROM read_parquet($found, hive_partitioning = false) AS found
  JOIN read_parquet($entries, hive_partitioning = false) AS entries USING (number)
  JOIN read_parquet($matched, hive_partitioning = false) AS matched USING (row)
),
mixed_1 AS (
  SELECT row, rows,
    (xor(bits, bits >> 30)::UHUGEINT * 13787848793156543929 & 18446744073709551615)::UBIGINT AS bits
  FROM mixed_0
),
mixed_2 AS (
  SELECT row, rows,
    (xor(bits, bits >> 27)::UHUGEINT * 10723151780598845931 & 18446744073709551615)::UBIGINT AS bits
  FROM mixed_1
),
drawn AS (
  SELECT row, min((xor(bits, bits >> 31) >> 11)::DOUBLE / (1::BIGINT << 53) * rows) AS smallest_t
  FROM mixed_2 GROUP BY row
)
SELECT matched.*, smallest_t, CASE
  WHEN smallest_t IS NULL THEN 'no_entry'
  WHEN smallest_t >= $t THEN 'too_frequent'
  END AS reason
FROM read_parquet($matched, hive_partitioning = false) AS matched
LEFT JOIN drawn USING (row)
