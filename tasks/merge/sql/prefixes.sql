-- What the entries of the table `listed` begin with: their first word (`depth` 0), their first two,
-- and so on to the whole; `number`: which entry it is; `goes_on`: whether one is longer.
WITH begun AS (
  SELECT number, words, unnest(range(len(words))) AS depth
  FROM (SELECT number, string_split(entry, ' ') AS words FROM listed)
)
SELECT depth, array_to_string(words[:depth + 1], ' ') AS prefix,
  max(CASE WHEN depth + 1 = len(words) THEN number END) AS number,
  bool_or(depth + 1 < len(words)) AS goes_on
FROM begun
GROUP BY depth, prefix
ORDER BY depth, prefix
