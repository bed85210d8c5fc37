#!/usr/bin/env bash
# The README's two commands on a fresh Debian: a temporary root that debootstrap makes, with the packages that the README
# names and nothing else, and the last commit. Needs root and debootstrap; the root is deleted at the end.
#
#   make fresh-test                          # trixie: Python 3.13
#   make fresh-test SUITE=bookworm           # Python 3.11
#   FRESH_BIND=/srv/wheels PIP_FIND_LINKS=/srv/wheels make fresh-test    # folders that pip may need in there
set -euo pipefail
suite=${1:-trixie}
cd "$(dirname "$0")/.."
if [ "$(id -u)" != 0 ] || ! command -v debootstrap >/dev/null; then
  echo "fresh-test: needs root and debootstrap: apt install debootstrap" >&2
  exit 2
fi
if [ "${FRESH_UNSHARED:-}" != yes ]; then
  # In a mount namespace of its own: whatever becomes of this script, no mount is left, and rm meets none.
  FRESH_UNSHARED=yes exec unshare --mount "$0" "$@"
fi

# shellcheck disable=SC2016 # backquotes of Markdown
packages=$(sed -n 's/.*`apt install \([^`]*\)`.*/\1/p' README.md)
root=$(mktemp --directory)
trap 'umount --recursive --quiet "$root" || true; rm -rf --one-file-system "$root"' EXIT
mount --bind "$root" "$root" # so that all that is mounted below goes at once
debootstrap --variant=minbase "$suite" "$root" >"$root.log" || { tail "$root.log" >&2; exit 1; }
rm "$root.log"

mkdir "$root/project"
git archive HEAD | tar -x -C "$root/project"
cp /etc/resolv.conf /etc/hosts "$root/etc/" # an installed system knows its own name
for folder in /proc /dev /dev/shm ${FRESH_BIND:-}; do
  mkdir -p "$root$folder"
  mount --bind "$folder" "$root$folder"
done

inside() {
  local settings=(PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 DEBIAN_FRONTEND=noninteractive) name
  for name in "${!PIP_@}"; do settings+=("$name=${!name}"); done
  chroot "$root" /usr/bin/env --ignore-environment --chdir=/project "${settings[@]}" "$@"
}
inside apt-get update -qq
# shellcheck disable=SC2086 # a list of words
inside apt-get install --yes --quiet=2 --no-install-recommends $packages
# Whom this machine trusts, which a package may just have written anew.
certificates=/etc/ssl/certs/ca-certificates.crt
[ ! -e "$certificates" ] || install -D "$certificates" "$root$certificates"
inside python3 --version
inside make demo
inside make test
