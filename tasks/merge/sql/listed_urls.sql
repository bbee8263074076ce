-- What is asked of each of the URLs of a list, normalised.
WITH published AS (
  SELECT raw_url, place, NULL::VARCHAR AS raw_caption
  FROM (SELECT unnest($urls::VARCHAR[]) AS raw_url, unnest(range(len($urls))) AS place)
),
{normalise}
{select}
