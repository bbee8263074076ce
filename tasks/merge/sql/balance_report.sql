-- Of a balanced merge: entries by the rows that hold them, the most frequent, rows that other t keep.
WITH entries AS (
  FROM read_parquet($entries, hive_partitioning = false)
),
sizes AS (
  SELECT CASE WHEN rows > 0 THEN 10 ** (len(rows::VARCHAR) - 1) ELSE 0 END::BIGINT AS at_least,
    count(*) AS entries, sum(rows)::BIGINT AS matches
  FROM entries GROUP BY at_least
),
others AS (
  SELECT t, sum(rows)::BIGINT AS rows
  FROM read_parquet($kept_at, hive_partitioning = false) GROUP BY t
)
SELECT $t::BIGINT AS t, count(*) AS entries, count(*) FILTER (rows > $t) AS entries_above_t,
  coalesce(sum(rows), 0)::BIGINT AS matches,
  coalesce(sum(rows) FILTER (rows > $t), 0)::BIGINT AS matches_above_t,
  (SELECT coalesce(list(others ORDER BY t), []) FROM others) AS kept_at,
  (SELECT coalesce(list(sizes ORDER BY at_least), []) FROM sizes) AS entries_by_rows,
  (SELECT coalesce(list(struct_pack(entry, rows) ORDER BY rows DESC, number), []) FROM (
    FROM entries ORDER BY rows DESC, number LIMIT 20
  )) AS most_frequent
FROM entries
