-- One partition: rows of `deduped` that are dropped, and that other sources have too.
SELECT source, reason, others, count(*) AS rows FROM deduped
WHERE reason IS NOT NULL OR others <> 0 GROUP BY ALL
