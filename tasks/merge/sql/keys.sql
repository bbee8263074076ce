-- One partition of keys, with whether the edition its source is compared with lacks the address.
SELECT keys.*, compared.source IS NOT NULL AND known.key IS NULL AS withdrawn
FROM part_keys AS keys
LEFT JOIN (
  SELECT unnest($compared::INTEGER[]) AS source, unnest($editions::INTEGER[]) AS edition
) AS compared USING (source)
LEFT JOIN known ON known.edition = compared.edition AND known.key = keys.key
