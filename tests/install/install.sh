#!/usr/bin/env bash
# What scripts/install leaves in an empty directory, and that --uninstall takes it back; and whether the unit is one
# that systemd understands, and as closed as we say.
#
#   tests/install/install.sh TMEM
#
# Changes nothing outside a directory of its own.

set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
export TMEM_BIN=$1
passed=0 failed=0
pass() { passed=$((passed + 1)) && echo "ok    $*"; }
fail() { failed=$((failed + 1)) && echo "FAIL  $*"; }
check() {
    local name=$1
    shift
    if "$@"; then pass "$name"; else fail "$name"; fi
}
home=$(mktemp -d)
trap 'rm -rf "$home"' EXIT
there=$home/root
mkdir "$there"

contents() { (cd "$there" && find . -type f -printf '%m %P\n' | sort -k2); }

"$root/scripts/install" --prefix /usr --destdir "$there" >"$home/said" || fail "the installation"
diff <(contents) - <<'END' && pass "what is installed, and how" || fail "what is installed, and how"
755 usr/bin/tmem
644 usr/lib/systemd/system/tmem.service
644 usr/lib/tmem/tmem.toml
644 usr/share/bash-completion/completions/tmem
644 usr/share/doc/tmem/LICENSE-APACHE
644 usr/share/doc/tmem/LICENSE-MIT
644 usr/share/doc/tmem/README.md
644 usr/share/doc/tmem/tmem-nbd.conf
644 usr/share/doc/tmem/tmem.toml.example
644 usr/share/fish/vendor_completions.d/tmem.fish
644 usr/share/zsh/site-functions/_tmem
END
check "each file is named" [ "$(wc -l <"$home/said")" = "$(contents | wc -l)" ]
check "the program runs" "$there/usr/bin/tmem" --version
"$there/usr/bin/tmem" config --root "$there" >"$home/config"
check "its settings are good" grep -q 'swapon = true  # /usr/lib/tmem/tmem.toml' "$home/config"

# The shells themselves read their completions.
bash -c ". '$there/usr/share/bash-completion/completions/tmem' && complete -p tmem" >"$home/bash"
check "bash completes" grep -q tmem "$home/bash"
complete_in_bash() {
    bash -c ". '$there/usr/share/bash-completion/completions/tmem'
        COMP_WORDS=(tmem sta) COMP_CWORD=1; _tmem tmem sta tmem; printf '%s\n' \"\${COMPREPLY[@]}\""
}
check "bash completes a command" [ "$(complete_in_bash)" = stats ]
check "zsh reads its completions" zsh -n "$there/usr/share/zsh/site-functions/_tmem"
complete_in_fish() {
    fish --no-config -c ". '$there/usr/share/fish/vendor_completions.d/tmem.fish'; complete -C 'tmem sta'" | cut -f1
}
check "fish completes a command" [ "$(complete_in_fish)" = stats ]

# The unit, with the program where it says, and the drop-in for NBD on it.
unit=$there/usr/lib/systemd/system/tmem.service
sed "s#\([@=]\)/usr/bin/tmem#\1$there/usr/bin/tmem#" "$unit" >"$home/tmem.service"
mkdir "$home/tmem.service.d"
cp "$there/usr/share/doc/tmem/tmem-nbd.conf" "$home/tmem.service.d/"
systemd-analyze verify --man=no "$home/tmem.service" >"$home/verify" 2>&1
# Units of the machine itself may be anything.
grep -E 'tmem.service|tmem-nbd' "$home/verify" && fail "systemd has something to say of the unit" ||
    pass "systemd understands every line of the unit"
rm -r "$home/tmem.service.d"
exposure=$(systemd-analyze security --offline=true --no-pager "$home/tmem.service" |
    sed -n 's/.*Overall exposure level[^:]*: \([0-9.]*\).*/\1/p')
check "its exposure is at most 3.0, it is ${exposure:-unknown}" awk "BEGIN { exit !(${exposure:-9} <= 3.0) }"
check "systemd is told nothing but by the daemon" grep -q '^Type=notify$' "$unit"

# What somebody has written stays.
mkdir -p "$there/etc/tmem/tmem.toml.d"
echo 'pool-limit = "1G"' >"$there/etc/tmem/tmem.toml.d/50-mine.toml"
echo 'pool-limit = "2G"' >"$there/usr/lib/tmem/tmem.toml"
"$root/scripts/install" --uninstall --prefix=/usr --destdir="$there" >"$home/said"
diff <(contents | cut -d' ' -f2) - <<'END' && pass "what was changed stays" || fail "what was changed stays"
etc/tmem/tmem.toml.d/50-mine.toml
usr/lib/tmem/tmem.toml
END
check "and it is said" [ "$(grep -c "kept.*$there/" "$home/said")" = 2 ]

rm -r "${there:?}"/*
DESTDIR=$there PREFIX=/usr/local "$root/scripts/install" >/dev/null
check "by hand it goes below /usr/local" test -x "$there/usr/local/bin/tmem"
check "and the unit starts it there" grep -q '^ExecStart=@/usr/local/bin/tmem ' \
    "$there/usr/local/lib/systemd/system/tmem.service"
"$there/usr/local/bin/tmem" config --root "$there" >"$home/config"
check "and its settings are found" grep -q '# /usr/local/lib/tmem/tmem.toml:' "$home/config"
DESTDIR=$there PREFIX=/usr/local "$root/scripts/install" --uninstall >"$home/said"
check "an uninstallation leaves nothing, and says nothing" [ -z "$(find "$there" -mindepth 1; cat "$home/said")" ]
DESTDIR=$there "$root/scripts/install" --uninstall
check "where nothing is, nothing is to be done" [ $? = 0 ]

echo "install.sh: $passed passed, $failed failed"
[ $failed = 0 ] && [ $passed -gt 0 ]
