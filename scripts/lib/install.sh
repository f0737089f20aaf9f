# Installs Debian packages that a build needs. Sourced by scripts/run and scripts/test.

# bindgen, which libublk builds with, loads libclang.
BUILD_PACKAGES=(gcc libc6-dev libclang1 libclang-common-14-dev)

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

install_packages() {
    command -v apt-get >/dev/null || {
        echo "missing: $* (no apt-get here; install what your distribution calls them)" >&2
        return 1
    }
    echo "installing: $*"
    as_root apt-get update -qq
    as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

install_build_packages() {
    command -v cargo >/dev/null || {
        echo "cargo is missing: install Rust 1.95 or newer, see https://rustup.rs" >&2
        return 1
    }
    local libclang
    libclang=$(ldconfig -p 2>/dev/null | grep -m1 libclang; ls /usr/lib/llvm-*/lib/libclang*.so* 2>/dev/null || true)
    if ! command -v cc >/dev/null || [ -z "$libclang" ]; then
        install_packages "${BUILD_PACKAGES[@]}"
    fi
}
