# Installs Debian packages that a build needs. Sourced by scripts/run and scripts/test.

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

# bindgen, which libublk builds with, loads libclang. libclang-cpp, which other packages bring, is
# another library.
have_libclang() {
    local names
    names=$({ ldconfig -p; ls /usr/lib/llvm-*/lib /usr/lib64 "${LIBCLANG_PATH:-/nonexistent}"; } 2>/dev/null)
    grep -qE '(^|[[:space:]/])libclang(-[0-9.]+)?\.so' <<<"$names"
}

# libclang and its headers, which are of one version and not of one package.
libclang_packages() {
    local version
    version=$(apt-cache depends libclang1 | sed -n 's/.*Depends: libclang1-\([0-9]*\)$/\1/p')
    [ -n "$version" ] && echo "libclang1-$version" "libclang-common-$version-dev"
}

install_build_packages() {
    command -v cargo >/dev/null || {
        echo "cargo is missing: install Rust 1.95 or newer, see https://rustup.rs" >&2
        return 1
    }
    if command -v cc >/dev/null && have_libclang; then return; fi
    command -v apt-get >/dev/null || {
        echo "a C compiler and libclang are needed to build: install what your distribution calls them" >&2
        return 1
    }
    as_root apt-get update -qq
    local libclang
    libclang=$(libclang_packages) || {
        echo "apt-get knows no libclang1: add Debian's main component to its sources" >&2
        return 1
    }
    echo "installing: gcc libc6-dev" $libclang
    # shellcheck disable=SC2086 # two words
    as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends gcc libc6-dev $libclang >/dev/null
}

# The NBD clients that others wrote, for tests/nbd/tools.sh.
install_nbd_tools() {
    local tool missing=''
    for tool in nbdinfo nbdcopy qemu-img qemu-io fio; do
        command -v $tool >/dev/null || missing+=" $tool"
    done
    /usr/bin/python3 -c 'import nbd' 2>/dev/null || missing+=" python3-libnbd"
    [ -n "$missing" ] || return 0
    command -v apt-get >/dev/null || {
        echo "missing:$missing: install what your distribution calls them" >&2
        return 1
    }
    as_root apt-get update -qq
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        libnbd-bin python3 python3-libnbd qemu-utils fio >/dev/null
}

# What reads what scripts/install brings: the shells, and systemd.
install_packaging_tools() {
    local tool missing=''
    for tool in zsh fish systemd-analyze; do
        command -v $tool >/dev/null || missing+=" ${tool/systemd-analyze/systemd}"
    done
    [ -n "$missing" ] || return 0
    command -v apt-get >/dev/null || {
        echo "missing:$missing: install what your distribution calls them" >&2
        return 1
    }
    as_root apt-get update -qq
    # shellcheck disable=SC2086 # words
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
}
