-- One partition: the rows of `deduped` that stay.
SELECT * EXCLUDE reason FROM deduped WHERE reason IS NULL
