# Sourced by the scripts beside it: begins the caller anew in a network
# namespace of its own, as `source own_network.sh "$@"`. Afterwards $evenkeel is
# the release build.
evenkeel=$(cd "$(dirname "$0")/.." && pwd)/target/release/evenkeel
if [ "${INSIDE:-}" != 1 ]; then
  user=()
  [ "$(id -u)" = 0 ] || user=(--user --map-root-user)
  INSIDE=1 exec unshare "${user[@]}" --net "$0" "$@"
fi
ip link set lo up
