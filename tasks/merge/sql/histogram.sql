-- One partition: rows of `deduped` that stay, by the first bits of their keys.
SELECT source, bucket, count(*) AS rows FROM deduped WHERE reason IS NULL GROUP BY ALL
