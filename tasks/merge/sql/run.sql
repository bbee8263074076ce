, run_{depth} AS MATERIALIZED (
  SELECT run.* EXCLUDE (word_{depth}, prefix, number, goes_on), longer.prefix, longer.number, longer.goes_on
  FROM run_{before} AS run
  JOIN (
    FROM read_parquet($prefixes, hive_partitioning = false) WHERE depth = {depth}
  ) AS longer ON longer.prefix = run.prefix || ' ' || word_{depth}
  WHERE run.goes_on
)
