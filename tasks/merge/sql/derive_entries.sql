-- The `$wanted` words, and pairs of words side by side, that most of `captions` hold, with letters or
-- digits in each word; of those that equally many hold, the first by their text.
WITH split AS (
  SELECT string_split(regexp_replace(caption, $marks, ' \0 ', 'g'), ' ') AS words FROM captions
),
held AS (
  SELECT unnest(list_distinct(list_concat(words, list_transform(
    range(1, len(words)), lambda place: words[place] || ' ' || words[place + 1]
  )))) AS entry
  FROM split
)
SELECT entry
FROM held
WHERE regexp_full_match(entry, '[^ ]*[\pL\pN][^ ]*( [^ ]*[\pL\pN][^ ]*)?')
GROUP BY entry
ORDER BY count(*) DESC, entry
LIMIT $wanted
