-- One partition: rows of `deduped` that are dropped.
SELECT source, reason, count(*) AS rows FROM deduped WHERE reason IS NOT NULL GROUP BY ALL
