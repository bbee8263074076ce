#!/bin/sh
# As the entry point of the image `chrislusf/seaweedfs`: root gives the data to a user of id 1000 and
# becomes that user.
set -eu
if [ "$(id -u)" = 0 ]; then
  chown -R 1000:1000 /data
  exec setpriv --reuid=1000 --regid=1000 --clear-groups "$0" "$@"
fi
exec weed -logtostderr=true "$@"
