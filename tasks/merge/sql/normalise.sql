-- From `published` (row_in_file and the select list of schema.py) to `normalised`:
--   url      ready to fetch, none when no web server can be asked for it
--   address  what two URLs of the same image share: url without its scheme
--   caption  white space and control characters tidied
-- The scheme and host are lower case, the scheme's own port and the fragment are dropped, and
-- the path and query hold ASCII only: what needs no escape is not escaped, what does is (RFC 3986
-- section 6.2.2, RFC 3987 section 3.1). Credentials, other schemes and bad hosts give none.
-- Most URLs are in that form already: one look at `is_normal` spares them everything below. The
-- other regular expressions that look twice spare the dear rewriting for the rows that need it.
seen AS (
  SELECT *, coalesce(regexp_full_match(
    raw_url,
    'https?://[a-z0-9._\-]+/(?:[A-Za-z0-9\-._~!$&''()*+,;=:@/?]|%(?:[0189A-F][0-9A-F]|2[0-9A-CF]|3[A-F]|[46]0|5[B-E]|7[BCDF]))*'
  ), false) AS is_normal
  FROM published
),
trimmed AS (
  SELECT *,
    CASE WHEN is_normal OR NOT regexp_matches(raw_url, '[\x00-\x20]') THEN raw_url
      ELSE regexp_replace(raw_url, '^[\x00-\x20]+|[\x00-\x20]+$|[\t\n\r]+', '', 'g')
      END AS clean_url,
    CASE WHEN regexp_matches(raw_caption, '^ | $|  |\p{Cc}|[^\P{Z} ]')
      THEN trim(regexp_replace(raw_caption, '[\p{Z}\p{Cc}]+', ' ', 'g'))
      ELSE raw_caption END AS caption
  FROM seen
),
split AS (
  SELECT *, CASE WHEN NOT is_normal THEN regexp_extract(
    clean_url,
    '^(?i:(https?))://([^/?#:@\[\]\\]+|\[[0-9A-Fa-f:.]+\])(?::([0-9]{0,5}))?((?:[/?][^#]*)?)(?:#|$)',
    ['scheme', 'host', 'port', 'path']
  ) END AS parts
  FROM trimmed
),
mended AS (
  SELECT * EXCLUDE (parts),
    lower(parts.scheme) AS scheme,
    CASE WHEN parts.host = '' THEN NULL
      WHEN regexp_full_match(parts.host, '[A-Za-z0-9._\-]+|\[.*') THEN lower(parts.host)
      ELSE idna_host(parts.host) END AS host,
    TRY_CAST(parts.port AS INTEGER) AS port,
    CASE WHEN starts_with(parts.path, '/') THEN '' ELSE '/' END ||
    CASE WHEN regexp_full_match(parts.path, '[A-Za-z0-9\-._~!$&''()*+,;=:@/?]*') THEN parts.path
      ELSE array_to_string(list_transform(
        regexp_extract_all(
          parts.path, '%[0-9A-Fa-f]{2}|[A-Za-z0-9\-._~!$&''()*+,;=:@/?]+|(?s:.)'
        ),
        lambda piece: CASE
          WHEN regexp_full_match(
            piece, '%(2[DdEe]|3[0-9]|[46][1-9A-Fa-f]|[57][0-9Aa]|5[Ff]|7[Ee])'
          ) THEN url_decode(piece)
          WHEN length(piece) = 3 AND starts_with(piece, '%') THEN upper(piece)
          WHEN regexp_full_match(piece, '[A-Za-z0-9\-._~!$&''()*+,;=:@/?]+') THEN piece
          ELSE url_encode(piece) END
      ), '') END AS path
  FROM split
),
addressed AS (
  SELECT * EXCLUDE (host, port, path),
    CASE WHEN is_normal
      THEN CASE WHEN starts_with(raw_url, 'https') THEN substr(raw_url, 9) ELSE substr(raw_url, 8) END
    WHEN scheme <> '' AND (port IS NULL OR port BETWEEN 1 AND 65535) THEN
      host || CASE
        WHEN port IS NULL OR (scheme = 'http' AND port = 80) OR (scheme = 'https' AND port = 443)
          THEN ''
        ELSE ':' || port::VARCHAR END || path
    END AS address
  FROM mended
),
normalised AS (
  SELECT *, CASE WHEN is_normal THEN raw_url ELSE scheme || '://' || address END AS url
  FROM addressed
)
