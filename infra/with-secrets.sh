#!/bin/sh
# Secrets are files; the servers read them from their environment. Exports every file of /run/secrets
# whose name is that of a variable, then becomes the given command.
set -eu
for file in "${SECRETS_FOLDER:-/run/secrets}"/[A-Z]*; do
  [ -r "$file" ] || continue
  name=$(basename "$file")
  value=$(cat "$file")
  export "$name=$value"
done
exec "$@"
