-- From `published` (row_in_file and the select list of schema.py) to `normalised`:
--   url      ready to fetch, none when no web server can be asked for it
--   address  what two URLs of the same image share: url without its scheme
--   caption  white space and control characters tidied
-- The scheme and host are lower case, the scheme's own port, the fragment, the root's dot behind the
-- host and dot segments are dropped (tasks/web_addresses.py), and
-- the path and query hold ASCII only: what needs no escape is not escaped, what does is (RFC 3986
-- section 6.2.2, RFC 3987 section 3.1). Credentials, other schemes and bad hosts give none.
-- Most URLs are in that form already: one look at `is_normal` spares them everything below. The
-- list of one element gives the parts of a URL a name inside the branch, where only the other URLs
-- pay for them.
seen AS (
  SELECT *,
    NOT coalesce(regexp_matches(raw_caption, '^ | $|  |\p{Cc}|[^\P{Z} ]'), false) AS is_tidy,
    coalesce(regexp_full_match(
      raw_url,
      'https?://[a-z0-9._\-]*[a-z0-9_\-]/(?:[A-Za-z0-9\-._~!$&''()*+,;=:@/?]|%(?:[0189A-F][0-9A-F]|2[0-9A-CF]|3[A-F]|[46]0|5[B-E]|7[BCDF]))*'
    ), false) AND NOT contains(raw_url, '/.')
      AND NOT regexp_matches(raw_url, '^https?://(?:[^/]*\.)?(?:[0-9]+|0x[0-9a-f]*)/') AS is_normal
  FROM published
),
trimmed AS (
  SELECT *,
    CASE WHEN is_normal OR NOT regexp_matches(raw_url, '[\x00-\x20]') THEN raw_url
      ELSE regexp_replace(raw_url, '^[\x00-\x20]+|[\x00-\x20]+$|[\t\n\r]+', '', 'g')
      END AS clean_url,
    CASE WHEN is_tidy THEN raw_caption
      ELSE trim(regexp_replace(raw_caption, '[\p{Z}\p{Cc}]+', ' ', 'g')) END AS caption
  FROM seen
),
addressed AS (
  SELECT *, CASE
    WHEN is_normal AND starts_with(raw_url, 'https') THEN substr(raw_url, 9)
    WHEN is_normal THEN substr(raw_url, 8)
    ELSE list_transform(
      [regexp_extract(
        clean_url,
        '^(?i:(https?))://([^/?#:@\[\]\\]+|\[[0-9A-Fa-f:.]+\])(?::([0-9]{0,5}))?((?:[/?][^#]*)?)(?:#|$)',
        ['scheme', 'host', 'port', 'path']
      )],
      lambda parts: CASE
        WHEN parts.scheme = '' OR TRY_CAST(parts.port AS INTEGER) NOT BETWEEN 1 AND 65535 THEN NULL
        ELSE
          CASE
            WHEN regexp_full_match(parts.host, '(?:[A-Za-z0-9._\-]*\.)?[A-Za-z_\-][A-Za-z0-9_\-]*') THEN lower(parts.host)
            ELSE normalise_host(parts.host) END ||
          CASE
            WHEN parts.port = '' THEN ''
            WHEN TRY_CAST(parts.port AS INTEGER) =
              CASE WHEN lower(parts.scheme) = 'http' THEN 80 ELSE 443 END THEN ''
            ELSE ':' || TRY_CAST(parts.port AS INTEGER)::VARCHAR END ||
          list_transform([CASE WHEN starts_with(parts.path, '/') THEN '' ELSE '/' END ||
          CASE
            WHEN regexp_full_match(parts.path, '[A-Za-z0-9\-._~!$&''()*+,;=:@/?]*') THEN parts.path
            ELSE array_to_string(list_transform(
              regexp_extract_all(
                parts.path,
                '%[0-9A-Fa-f]{2}|[A-Za-z0-9\-._~!$&''()*+,;=:@/?]+|[^A-Za-z0-9\-._~!$&''()*+,;=:@/?%]+|%'
              ),
              lambda piece: CASE
                WHEN starts_with(piece, '%') THEN CASE
                  WHEN length(piece) = 1 THEN '%25'
                  WHEN regexp_full_match(
                    piece, '%(2[DdEe]|3[0-9]|[46][1-9A-Fa-f]|[57][0-9Aa]|5[Ff]|7[Ee])'
                  ) THEN url_decode(piece)
                  ELSE upper(piece) END
                WHEN regexp_full_match(left(piece, 1), '[A-Za-z0-9\-._~!$&''()*+,;=:@/?]') THEN piece
                ELSE url_encode(piece) END
            ), '') END], lambda path: CASE
              WHEN contains(path, '/.') THEN remove_dot_segments(path) ELSE path END)[1]
        END
    )[1] END AS address
  FROM trimmed
),
normalised AS (
  SELECT *, CASE WHEN is_normal THEN raw_url
    ELSE lower(regexp_extract(clean_url, '^(?i:https?)://')) || address END AS url
  FROM addressed
)
