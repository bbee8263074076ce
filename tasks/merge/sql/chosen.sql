-- One partition: where the rows lie that a range of a source's selection takes of it, in order.
SELECT file, place, others
FROM read_parquet($kept, hive_partitioning = false)
WHERE source = $source AND key::UUID <= $last::UUID {after}
ORDER BY key::UUID
