#!/bin/sh
# Boots this host's own systemd as the first process of new namespaces, over a throw-away copy of the host's files.
#
#   boot.sh WORK      WORK is an empty folder; WORK/files is laid over the copy before the boot
#
# Nothing of the host changes but one cgroup, which the caller removes (its path is in WORK/cgroup). systemd is the only
# child of this process, which `unshare` becomes; whoever kills this process ends all of it. Needs root, overlayfs, a
# cgroup2 hierarchy, and Debian's systemd, util-linux and mount. On failure: a line on standard error and exit code 77.
set -eu

cannot() {
    echo "boot.sh: $1" >&2
    exit 77
}

# Inside: private mounts, then the new root.
if [ "${2-}" = inside ]; then
    work=$1
    new=$work/root
    mount -t tmpfs -o size=1g,mode=755 tmpfs "$work/over" || cannot "no tmpfs"
    mkdir "$work/over/upper" "$work/over/work"
    mount -t overlay -o "lowerdir=/,upperdir=$work/over/upper,workdir=$work/over/work" overlay "$new" || cannot "no overlayfs"
    mount -t proc proc "$new/proc"
    mount -t sysfs -o ro sysfs "$new/sys"
    mount -t cgroup2 cgroup2 "$new/sys/fs/cgroup" || cannot "no cgroup2"
    for folder in run tmp dev; do
        mount -t tmpfs -o mode=755 tmpfs "$new/$folder"
    done
    chmod 1777 "$new/tmp"
    for device in null zero full random urandom tty; do
        : > "$new/dev/$device"
        mount --bind "/dev/$device" "$new/dev/$device"
    done
    mkdir "$new/dev/shm" "$new/dev/pts"
    mount -t devpts -o newinstance,ptmxmode=0666 devpts "$new/dev/pts"
    ln -s pts/ptmx "$new/dev/ptmx"
    ln -s /proc/self/fd "$new/dev/fd"
    # None of the host's units starts by itself, and nothing generates any.
    rm -rf "$new"/etc/systemd/system/* "$new"/lib/systemd/system/*.wants "$new"/lib/systemd/system-generators/*
    : > "$new/etc/fstab"
    echo 00000000000000000000000000000001 > "$new/etc/machine-id"
    printf '[Unit]\nDescription=A test\nRequires=basic.target systemd-journald.service\nAfter=basic.target\n' > "$new/etc/systemd/system/test.target"
    cp -r "$work/files/." "$new/"
    ip link set lo up 2>/dev/null || true
    mkdir -p "$new/old"
    cd "$new"
    pivot_root . old
    umount -l /old
    exec env -i container=evenkeel-test PATH=/usr/sbin:/usr/bin:/sbin:/bin \
        /lib/systemd/systemd --system --unit=test.target --show-status=no
fi

work=$(readlink -f "$1")
[ "$(id -u)" = 0 ] || cannot "needs root"
[ -x /lib/systemd/systemd ] || cannot "systemd is not installed"
mkdir -p "$work/over" "$work/root" "$work/files"
# A cgroup of its own, so that systemd's are below it and nobody else's are touched.
top=$(findmnt -n -o TARGET -t cgroup2 | head -n 1)
[ -n "$top" ] || cannot "no cgroup2 hierarchy is mounted"
cgroup=$top/evenkeel-test-$$
mkdir "$cgroup" 2>/dev/null || cannot "no cgroup can be made below $top"
echo "$cgroup" > "$work/cgroup"
echo $$ > "$cgroup/cgroup.procs"
exec unshare --mount --pid --uts --ipc --net --cgroup --propagation private --fork --kill-child=KILL \
    "$0" "$work" inside
