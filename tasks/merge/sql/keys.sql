-- One partition of keys, with why they do not count: the edition their source is compared with lacks
-- the address, or an earlier merge has given it.
SELECT keys.*, CASE
  WHEN compared.source IS NOT NULL AND known.key IS NULL THEN 'withdrawn'
  WHEN given.key IS NOT NULL THEN 'given_before'
  END AS dropped
FROM part_keys AS keys
LEFT JOIN (
  SELECT unnest($compared::INTEGER[]) AS source, unnest($editions::INTEGER[]) AS edition
) AS compared USING (source)
LEFT JOIN known ON known.edition = compared.edition AND known.key = keys.key
LEFT JOIN known AS given ON given.edition = $given::INTEGER AND given.key = keys.key
