# What the guest of scripts/vm boots from: the kernel, an initramfs and a read-only root image.
#
# Sourced by scripts/vm. Everything is made from the host's own packages, without root, under
# $VM_CACHE, and named by a hash of what went into it: an input that changes makes a new file, and
# an unchanged one is never built twice. Programs come with the libraries that ldd names and keep
# their paths, so the guest runs exactly what the host has.

# Debian packages that hold what is taken below; `scripts/vm --install` installs them.
VM_PACKAGES=(qemu-system-x86 linux-image-6.12-amd64 busybox-static zstd xz-utils cpio kmod
    e2fsprogs util-linux mount fio dmsetup bash coreutils procps nbd-client)

# Debian packages of a guest that systemd boots (`scripts/vm --system`), and where what they bring is kept.
VM_SYSTEM_PACKAGES=(systemd systemd-sysv udev kmod mount util-linux bash coreutils grep sed mawk procps base-passwd)

# Its units that have nothing to do here and take time.
VM_SYSTEM_MASKED=(getty.target systemd-logind.service systemd-hwdb-update.service systemd-firstboot.service
    systemd-sysusers.service systemd-update-utmp.service systemd-update-utmp-runlevel.service systemd-random-seed.service
    systemd-user-sessions.service systemd-networkd.socket ldconfig.service dev-hugepages.mount dev-mqueue.mount
    sys-kernel-config.mount sys-kernel-tracing.mount sys-fs-fuse-connections.mount
    proc-sys-fs-binfmt_misc.automount systemd-ask-password-console.path systemd-ask-password-wall.path
    systemd-journal-flush.service systemd-binfmt.service remote-fs.target timers.target e2scrub_reap.service)

# Kernel modules for the guest; what they depend on is added.
VM_BOOT_MODULES=(virtio_blk ext4)
VM_MODULES=(ublk_drv nbd zram loop null_blk dm-mod dm-delay dm-flakey lz4 lz4hc zstd lzo lzo-rle
    crc32c_generic)

# Programs for the guest, looked up in VM_PATH; `?` in front marks one it can do without.
VM_PATH=/usr/sbin:/usr/bin:/sbin:/bin
VM_PROGRAMS=(bash fio mkswap swapon swapoff blkdiscard mkfs.ext4 e2fsck fsck.ext4 dmsetup fsfreeze
    blkid losetup kmod nbd-client dd cmp diff stty numfmt ?strace ?taskset ?unshare ?ps)

# Files and folders that a program needs besides its libraries; the guest has them where we have.
VM_TREES=()

# vm_add LIST: adds what `scripts/vm --with` names.
vm_add() {
    local name
    for name in ${1//,/ }; do
        case $name in
            sort) VM_PROGRAMS+=(sort) ;;
            python3)
                VM_PACKAGES+=(python3-minimal libpython3-stdlib)
                VM_PROGRAMS+=(python3)
                VM_TREES+=(/usr/lib/python3.*)
                ;;
            nbdkit)
                VM_PACKAGES+=(nbdkit)
                VM_PROGRAMS+=(nbdkit)
                VM_TREES+=(/usr/lib/*/nbdkit/plugins/nbdkit-memory-plugin.so)
                ;;
            *) vm_die "--with has python3, nbdkit and sort, not $name" ;;
        esac
    done
}

vm_kernel_release() {
    local image
    image=$(printf '%s\n' /boot/vmlinuz-6.12*-amd64 | grep -v -e -cloud- -e '\*' | sort -V | tail -1)
    [ -n "$image" ] && echo "${image#/boot/vmlinuz-}"
}

# Says what is missing, and how to get it.
vm_require() {
    local missing=() program
    for program in qemu-system-x86_64 busybox zstd xz cpio mke2fs depmod sha256sum; do
        PATH=$PATH:$VM_PATH command -v "$program" >/dev/null || missing+=("$program")
    done
    for program in "${VM_PROGRAMS[@]}"; do
        [ "${program#\?}" != "$program" ] && continue
        PATH=$VM_PATH command -v "$program" >/dev/null || missing+=("$program")
    done
    for program in "${VM_TREES[@]}"; do
        [ -e "$program" ] || missing+=("$program")
    done
    [ -n "$(vm_kernel_release)" ] || missing+=("/boot/vmlinuz-6.12*-amd64")
    if [ ${#missing[@]} -gt 0 ]; then
        vm_die "missing: ${missing[*]}" \
            "Install with: scripts/vm --install" "(apt-get install ${VM_PACKAGES[*]})"
    fi
}

vm_install() {
    local sudo=()
    [ "$(id -u)" = 0 ] || sudo=(sudo)
    "${sudo[@]}" apt-get update -q
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -q --no-install-recommends "${VM_PACKAGES[@]}"
}

# Paths of a module and of all it needs, in loading order; nothing for one that is built in.
vm_module_files() {
    local release=$1 module
    shift
    for module in "$@"; do
        PATH=$PATH:$VM_PATH modprobe --dirname / --set-version "$release" --show-depends "$module" ||
            vm_die "kernel $release has no module $module"
    done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }'
}

vm_unpack_module() {
    case $1 in
        *.xz) xz -dc "$1" >"$2" ;;
        *.zst) zstd -qdc "$1" >"$2" ;;
        *) cp "$1" "$2" ;;
    esac
}

# Uncompressed kernel, for QEMU's PVH entry: the guest need not decompress itself, which is most of
# its boot time without hardware acceleration.
vm_build_kernel() {
    local release=$1 target=$2 source=/boot/vmlinuz-$1 offset
    offset=$(LC_ALL=C grep -abo -m1 -P '\x28\xb5\x2f\xfd' "$source" | head -1 | cut -d: -f1)
    [ -n "$offset" ] || vm_die "no zstd stream in $source"
    # zstd writes the whole kernel, then complains about the boot stub that follows it.
    tail -c +$((offset + 1)) "$source" | zstd -qdc >"$target" 2>/dev/null || true
    [ "$(head -c 4 "$target" | tail -c 3)" = ELF ] || vm_die "$source did not unpack to an ELF kernel"
}

vm_build_initramfs() {
    local release=$1 target=$2 root file
    root=$(mktemp -d "$VM_CACHE/initramfs.XXXXXX")
    mkdir -p "$root"/{bin,proc,sys,dev,newroot,modules,payload}
    cp "$(command -v busybox)" "$root/bin/busybox"
    cp "$VM_ROOT/tests/vm/initramfs-init" "$root/init"
    chmod 755 "$root/init"
    for file in $(vm_module_files "$release" "${VM_BOOT_MODULES[@]}"); do
        vm_unpack_module "$file" "$root/modules/$(basename "${file%%.ko*}").ko"
        echo "/modules/$(basename "${file%%.ko*}").ko" >>"$root/modules/order"
    done
    (cd "$root" && find . | cpio --quiet -o -H newc -R 0:0) >"$target"
    rm -rf "$root"
}

# Prints program paths with the libraries they load.
vm_closure() {
    local program
    for program in "$@"; do
        echo "$program"
        ldd "$program" 2>/dev/null | grep -o '/[^ ]*' || true
    done | sort -u
}

# The host's programs, and libraries that are loaded by name.
vm_root_programs() {
    local program path
    for program in "${VM_PROGRAMS[@]}"; do
        path=$(PATH=$VM_PATH command -v "${program#\?}") && echo "$path"
    done
    for path in "${VM_TREES[@]}"; do
        [ -d "$path" ] || echo "$path"
    done
}

vm_build_root() {
    local release=$1 target=$2 root file path
    shift 2
    root=$(mktemp -d "$VM_CACHE/root.XXXXXX")
    mkdir -p "$root"/{usr/bin,usr/sbin,usr/lib,usr/lib64,etc,proc,sys,dev,run,tmp,tests,results,mnt}
    ln -s usr/bin "$root/bin"
    ln -s usr/sbin "$root/sbin"
    ln -s usr/lib "$root/lib"
    ln -s usr/lib64 "$root/lib64"
    cp "$(command -v busybox)" "$root/usr/bin/busybox"
    for path in $(busybox --list | grep -vx busybox); do
        ln -sf busybox "$root/usr/bin/$path"
    done
    for path in $(vm_closure $(vm_root_programs) "$@"); do
        file=$root$path
        case $path in
            /bin/* | /sbin/* | /lib/* | /lib64/* | /usr/*) ;;
            *) file=$root/usr/bin/$(basename "$path") ;;
        esac
        mkdir -p "$(dirname "$file")"
        cp -L --remove-destination "$path" "$file"
    done
    for path in "${VM_TREES[@]}"; do
        [ -d "$path" ] || continue
        mkdir -p "$root$(dirname "$path")"
        cp -a "$path" "$root$path"
    done
    for path in modprobe insmod rmmod lsmod; do
        ln -sf "$(PATH=$VM_PATH command -v kmod)" "$root/usr/sbin/$path"
        rm -f "$root/usr/bin/$path"
    done
    for path in "$@"; do
        cp -L --remove-destination "$path" "$root/usr/bin/$(basename "$path")"
    done
    for file in $(vm_module_files "$release" "${VM_BOOT_MODULES[@]}" "${VM_MODULES[@]}"); do
        path=$root/usr/lib/modules/$release/${file#*/modules/"$release"/}
        mkdir -p "$(dirname "$path")"
        vm_unpack_module "$file" "${path%%.ko*}.ko"
    done
    cp /lib/modules/"$release"/modules.{order,builtin,builtin.modinfo} \
        "$root/usr/lib/modules/$release/"
    PATH=$PATH:$VM_PATH depmod --basedir "$root" "$release"
    echo 'root:x:0:0:root:/:/bin/bash' >"$root/etc/passwd"
    echo 'root:x:0:' >"$root/etc/group"
    PATH=$PATH:$VM_PATH mke2fs -q -t ext4 -O ^has_journal -E root_owner=0:0 -m 0 -d "$root" \
        "$target" $(($(du -sm "$root" | cut -f1) * 5 / 4 + 16))M
    rm -rf "$root"
}

# The packages of VM_SYSTEM_PACKAGES and all that they need, unpacked; from the host's own sources, whatever it has installed
# itself. None of their scripts is run, so it takes no root.
vm_build_debian() {
    local target=$2 work deb path
    work=$(mktemp -d "$VM_CACHE/debian.XXXXXX")
    mkdir -p "$work"/{archives/partial,root}
    : >"$work/status"
    apt-get -q -y -o Dir::State::status="$work/status" -o Dir::Cache::archives="$work/archives" \
        -o APT::Get::Download-Only=true -o APT::Sandbox::User= -o Debug::NoLocking=1 \
        --no-install-recommends install "${VM_SYSTEM_PACKAGES[@]}" >"$work/log" 2>&1 ||
        vm_die "apt-get does not bring ${VM_SYSTEM_PACKAGES[*]}" "$(tail -5 "$work/log")"
    mkdir -p "$work"/root/usr/{bin,sbin,lib,lib64}
    for path in bin sbin lib lib64; do ln -s usr/$path "$work/root/$path"; done
    for deb in "$work"/archives/*.deb; do
        dpkg-deb --fsys-tarfile "$deb" |
            tar -x --keep-directory-symlink --no-same-owner -C "$work/root" \
                --exclude='./usr/share/doc/*' --exclude='./usr/share/man/*' --exclude='./usr/share/locale/*' \
                --exclude='./usr/share/zoneinfo/*' --exclude='./usr/share/perl5/*' --exclude='./usr/lib/*/perl*' \
                --exclude='./usr/share/bash-completion/*' --exclude='./usr/lib/udev/hwdb.d/*' ||
            vm_die "cannot unpack $deb"
    done
    tar -cf "$target" -C "$work/root" .
    rm -rf "$work"
}

# A Debian that systemd boots, with what scripts/install installs, and our programs.
vm_build_system() {
    local release=$1 target=$2 base=$3 root file path
    shift 3
    root=$(mktemp -d "$VM_CACHE/system.XXXXXX")
    tar -xf "$base" -C "$root"
    mkdir -p "$root"/{etc,proc,sys,dev,run,tmp,tests,results,mnt,root,var/{lib,log,tmp}}
    cp "$root/usr/share/base-passwd/passwd.master" "$root/etc/passwd"
    cp "$root/usr/share/base-passwd/group.master" "$root/etc/group"
    # An alternative of Debian's, and the groups that udev's rules name: packages' scripts would have made them.
    ln -s mawk "$root/usr/bin/awk"
    for path in input sgx kvm render; do echo "$path:x:$((900 + ${#path})):" >>"$root/etc/group"; done
    echo 6d74656d6d74656d6d74656d6d74656d >"$root/etc/machine-id"
    echo tmem-vm >"$root/etc/hostname"
    echo '/dev/vda / ext4 rw 0 0' >"$root/etc/fstab"
    mkdir -p "$root/etc/systemd/journald.conf.d" "$root/etc/systemd/system"
    # What is logged is on the console too, where the host sees it.
    printf '[Journal]\nStorage=volatile\nRuntimeMaxUse=8M\nForwardToConsole=yes\nTTYPath=/dev/ttyS0\nMaxLevelConsole=info\n' \
        >"$root/etc/systemd/journald.conf.d/vm.conf"
    for path in "${VM_SYSTEM_MASKED[@]}"; do ln -s /dev/null "$root/etc/systemd/system/$path"; done
    cat >"$root/etc/systemd/system/tmem-vm.service" <<'END'
[Unit]
After=multi-user.target
[Service]
ExecStart=/tests/system-init
KillMode=process
END
    for file in $(vm_closure "$@"); do
        case $file in
            /lib/* | /lib64/* | /usr/lib/*) path=$root$file ;;
            *) path=$root/usr/bin/$(basename "$file") ;;
        esac
        # Debian's own libraries are its own.
        [ -e "$path" ] || install -D -m 755 "$file" "$path"
    done
    TMEM_BIN=$root/usr/bin/tmem "$VM_ROOT/scripts/install" --prefix /usr --destdir "$root" >/dev/null
    mkdir -p "$root/etc/systemd/system/swap.target.wants"
    ln -s /usr/lib/systemd/system/tmem.service "$root/etc/systemd/system/swap.target.wants/"
    for file in $(vm_module_files "$release" "${VM_BOOT_MODULES[@]}" ublk_drv); do
        path=$root/usr/lib/modules/$release/${file#*/modules/"$release"/}
        mkdir -p "$(dirname "$path")"
        vm_unpack_module "$file" "${path%%.ko*}.ko"
    done
    cp /lib/modules/"$release"/modules.{order,builtin,builtin.modinfo} \
        "$root/usr/lib/modules/$release/"
    PATH=$PATH:$VM_PATH depmod --basedir "$root" "$release"
    PATH=$PATH:$VM_PATH mke2fs -q -t ext4 -E root_owner=0:0 -m 0 -d "$root" \
        "$target" $(($(du -sm "$root" | cut -f1) * 5 / 4 + 64))M
    rm -rf "$root"
}

vm_prepare_base() {
    mkdir -p "$VM_CACHE"
    VM_BASE=$(vm_cached debian "$({
        declare -f vm_build_debian
        echo "${VM_SYSTEM_PACKAGES[*]}"
        cat /etc/debian_version
    } | vm_hash)" vm_build_debian -)
}

# vm_cached KIND HASH BUILDER ARGS...: path of the cached file, built when it is not there. The last
# four of a kind are kept, for runs side by side with different binaries.
vm_cached() {
    local kind=$1 hash=$2 target=$VM_CACHE/$1-$2 old
    shift 2
    if [ ! -e "$target" ]; then
        "$1" "$2" "$target.$$" "${@:3}" >/dev/null
        mv "$target.$$" "$target"
        for old in $(ls -t "$VM_CACHE/$kind"-* | tail -n +5); do rm -f "$old"; done
    fi
    touch "$target"
    echo "$target"
}

vm_hash() { sha256sum | cut -c1-16; }

vm_prepare_kernel() {
    local release
    release=$(vm_kernel_release)
    mkdir -p "$VM_CACHE"
    VM_KERNEL=$(vm_cached kernel "$(echo "$release $(stat -c '%s %Y' "/boot/vmlinuz-$release")" |
        vm_hash)" vm_build_kernel "$release")
}

# Sets VM_KERNEL, VM_INITRAMFS and VM_IMAGE. Arguments: programs to put into the image's /usr/bin.
vm_prepare() {
    local release recipe
    release=$(vm_kernel_release)
    recipe=$(cat "$VM_ROOT/scripts/lib/vm-image.sh" "$VM_ROOT/tests/vm/initramfs-init" | vm_hash)
    vm_prepare_kernel
    VM_INITRAMFS=$(vm_cached initramfs "$(echo "$recipe $release" | vm_hash)" \
        vm_build_initramfs "$release")
    if [ -n "${VM_SYSTEM:-}" ]; then
        vm_prepare_base
        VM_IMAGE=$(vm_cached system "$({
            echo "$recipe $release $VM_BASE"
            cat "$VM_ROOT/scripts/install" "$VM_ROOT"/dist/*
            sha256sum "$@"
        } | vm_hash)" vm_build_system "$release" "$VM_BASE" "$@")
        return
    fi
    VM_IMAGE=$(vm_cached root "$({
        echo "$recipe $release ${VM_TREES[*]} $*"
        stat -L -c '%n %s %Y' $(vm_closure $(vm_root_programs)) "$(command -v busybox)"
        sha256sum "$@"
    } | vm_hash)" vm_build_root "$release" "$@")
}
