#!/usr/bin/env bash
# What a container runtime does, by hand: scripts/enter_image.sh ROOT MODEL KEYS UID:GID COMMAND...   (scripts/try_image.py calls it)
# As deploy/compose.yaml asks: read-only root, no capabilities, no new privileges, the model read-only, the keys as a secret. In
# namespaces of its own: unshare --mount --pid --fork --kill-child.
set -euo pipefail
root=$1 model=$2 keys=$3 user=$4
shift 4
mkdir -p "$root/model" "$root/run/secrets"
mount --bind "$root" "$root"
mount -t tmpfs tmpfs "$root/dev"
for device in null zero urandom random; do
  touch "$root/dev/$device"
  mount --bind "/dev/$device" "$root/dev/$device"
done
mkdir "$root/dev/shm"
mount -t tmpfs tmpfs "$root/dev/shm"
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t tmpfs tmpfs "$root/tmp"
mount -t tmpfs -o "uid=${user%:*},gid=${user#*:}" tmpfs "$root/home/ard"
mount -t tmpfs tmpfs "$root/run/secrets"
install -m 0400 -o "${user%:*}" "$keys" "$root/run/secrets/api-keys.toml"
mount --bind "$model" "$root/model"
mount -o remount,bind,ro "$root/model"
mount -o remount,bind,ro "$root"
# The last shell is the process that becomes the command, so that a signal reaches that alone.
exec chroot "$root" /usr/bin/setpriv --reuid "${user%:*}" --regid "${user#*:}" --clear-groups --no-new-privs \
  --bounding-set=-all --inh-caps=-all sh -c 'cd /home/ard && exec "$@"' sh "$@"
