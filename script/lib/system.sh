# What Undercroft needs of the system: finds it, and installs it on Debian. Read by script/setup.
# shellcheck shell=bash

# An ordinary user's PATH lacks these on Debian; mke2fs lives there.
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

# Below this, live migration without KVM corrupts the guest; Debian 12 has 7.2, its backports 10.
QEMU_GOOD=9.0
QEMU_LEAST=7.2
BACKPORTS_LIST=/etc/apt/sources.list.d/undercroft-backports.list

# level | check | what for | packages of Debian | Fedora | Arch | openSUSE
read -r -d '' NEEDS <<'TABLE' || true
must|python|Python 3.11 or newer with venv|python3 python3-venv|python3|python|python313
must|qemu|qemu-system-x86_64 7.2 or newer: runs the VMs|qemu-system-x86|qemu-system-x86-core|qemu-system-x86|qemu-x86
must|command qemu-img|qemu-img: disks|qemu-utils|qemu-img|qemu-img|qemu-tools
should|ovmf|OVMF: UEFI and secure boot|ovmf|edk2-ovmf|edk2-ovmf|qemu-ovmf-x86_64
should|command swtpm|swtpm: virtual TPM|swtpm|swtpm|swtpm|swtpm
should|command swtpm_setup|swtpm_setup: virtual TPM|swtpm-tools|swtpm-tools|swtpm|swtpm
should|command mmdebstrap|mmdebstrap: builds the image debian:12|mmdebstrap|mmdebstrap|mmdebstrap|mmdebstrap
should|command newuidmap|newuidmap: builds images without root|uidmap|shadow-utils|shadow|shadow
should|command mke2fs|mke2fs: builds images|e2fsprogs|e2fsprogs|e2fsprogs|e2fsprogs
should|command mkfs.vfat|mkfs.vfat: builds images|dosfstools|dosfstools|dosfstools|dosfstools
should|command mcopy|mcopy: builds images|mtools|mtools|mtools|mtools
should|command fakeroot|fakeroot: builds images without root|fakeroot|fakeroot|fakeroot|fakeroot
should|command lz4|lz4: kernels that boot faster|lz4|lz4|lz4|lz4
should|command zstd|zstd: compressed images|zstd|zstd|zstd|zstd
should|command ssh-keygen|ssh: keys for guests|openssh-client|openssh-clients|openssh|openssh-clients
should|file /etc/ssl/certs/ca-certificates.crt /etc/ssl/ca-bundle.pem|certificates for downloads|ca-certificates|ca-certificates|ca-certificates|ca-certificates
TABLE

os_release() { # os_release KEY: its value in /etc/os-release
    (. /etc/os-release 2>/dev/null && eval "printf '%s' \"\${$1:-}\"")
}

at_least() { # at_least VERSION LEAST
    [[ $1 == "$(printf '%s\n%s\n' "$1" "$2" | sort -V | tail -n 1)" ]]
}

qemu_version() { # like 10.0.2; empty when there is no QEMU
    local text
    text=$(qemu-system-x86_64 --version 2>/dev/null || true)
    if [[ $text =~ version\ ([0-9]+(\.[0-9]+)*) ]]; then printf '%s' "${BASH_REMATCH[1]}"; fi
}

is_there() { # is_there CHECK [ARGUMENT...]: a row's second column
    local check=$1 path
    shift
    case $check in
    python) venv_works || [[ -n $(find_python) ]] ;;
    qemu) [[ -n $(qemu_version) ]] && at_least "$(qemu_version)" "$QEMU_LEAST" ;;
    command) command -v "$1" >/dev/null ;;
    file)
        for path in "$@"; do [[ ! -e $path ]] || return 0; done
        return 1
        ;;
    ovmf)
        is_there file /usr/share/OVMF/OVMF_CODE_4M.fd /usr/share/edk2/ovmf/OVMF_CODE.fd \
            /usr/share/edk2/x64/OVMF_CODE.4m.fd /usr/share/qemu/ovmf-x86_64-4m-code.bin
        ;;
    esac
}

# Fills `missing` with rows of the table.
find_missing() {
    local row check
    missing=()
    while IFS= read -r row; do
        IFS='|' read -r _ check _ <<<"$row"
        # shellcheck disable=SC2086 # a check and its arguments
        is_there $check || missing+=("$row")
    done <<<"$NEEDS"
}

packages_of() { # packages_of COLUMN: of all that is missing; 1 is Debian
    local row
    for row in "${missing[@]}"; do cut -d'|' -f$((3 + $1)) <<<"$row"; done |
        tr ' ' '\n' | sort -u | tr '\n' ' '
}

# The suites that apt is set up for: `suite site`, also before the first apt-get update.
# shellcheck disable=SC2016 # $(RELEASE) is for apt
apt_suites() { apt-get indextargets --no-release-info --format '$(RELEASE) $(SITE)' 2>/dev/null | sort -u; }

has_backports() { apt_suites | grep -q '^bookworm-backports '; }

# The line for apt that adds Debian 12's backports, on the mirror that apt already uses.
backports_line() {
    local site key=/usr/share/keyrings/debian-archive-keyring.gpg
    site=$(apt_suites | sed -n 's/^\(bookworm\|stable\|oldstable\) //p' | sed -n 1p)
    [[ -n $site ]] || return 1
    [[ -e $key ]] && key="[signed-by=$key] " || key=
    printf 'deb %s%s bookworm-backports main' "$key" "$site"
}

# QEMU's packages: those asked for, and those already here, which must move along to the same version.
qemu_packages() {
    {
        printf '%s\n' qemu-system-x86 qemu-utils
        dpkg-query --show --showformat '${source:Package} ${db:Status-Status} ${Package}\n' 2>/dev/null |
            sed -n 's/^qemu installed //p'
    } | sort -u | tr '\n' ' '
}

# The commands for root that bring what is missing, one a line. $1: yes to take QEMU from the backports.
debian_commands() {
    local packages line install='apt-get install --yes --no-install-recommends'
    packages=$(packages_of 1)
    if [[ $1 == yes ]] && ! has_backports && line=$(backports_line); then
        printf "echo '%s' > %s\n" "$line" "$BACKPORTS_LIST"
    fi
    echo apt-get update
    if [[ $1 == yes ]]; then
        echo "$install --target-release bookworm-backports $(qemu_packages)"
        packages=$(tr ' ' '\n' <<<"$packages" | grep -vx -e qemu-system-x86 -e qemu-utils | tr '\n' ' ')
    fi
    [[ ! $packages =~ [a-z] ]] || echo "$install $packages"
}

run_as_root() { # each line of standard input, shown and run; stops at the first that fails
    local line environment=(env DEBIAN_FRONTEND=noninteractive)
    ((EUID == 0)) || environment=(sudo env DEBIAN_FRONTEND=noninteractive)
    local lines
    mapfile -t lines
    for line in "${lines[@]}"; do
        printf '  # %s\n' "$line"
        "${environment[@]}" sh -c "${line/#apt-get /apt-get -q -o DPkg::Lock::Timeout=300 }" \
            </dev/null >"$log" 2>&1 || {
            tail -n 20 "$log" >&2
            return 1
        }
    done
}

can_be_root() { # with sudo, which may ask for a password where there is somebody to ask
    ((EUID == 0)) || { command -v sudo >/dev/null && { sudo -n true 2>/dev/null || { [[ -t 0 ]] && sudo -v; }; }; }
}

tell_missing() { # the rows of `missing`, in words
    local row level what
    for row in "${missing[@]}"; do
        IFS='|' read -r level _ what _ <<<"$row"
        if [[ $level == must ]]; then level=needed:; else level=optional:; fi
        printf '  %-10s%s\n' "$level" "$what"
    done
}

tell_how() { # which command of the administrator brings what is missing
    case " $(os_release ID) $(os_release ID_LIKE) " in
    *' debian '* | *' ubuntu '*) printf '  %s\n' "apt-get install --no-install-recommends $(packages_of 1)" ;;
    *' fedora '* | *' rhel '*) printf '  %s\n' "dnf install $(packages_of 2)" ;;
    *' arch '*) printf '  %s\n' "pacman -S --needed $(packages_of 3)" ;;
    *suse*) printf '  %s\n' "zypper install $(packages_of 4)" ;;
    *) printf '  %s\n' "your system's packages for these (Debian's names: $(packages_of 1))" ;;
    esac
}

must_is_missing() {
    local row
    for row in "${missing[@]}"; do [[ $row != 'must|'* ]] || return 0; done
    return 1
}

is_debian() {
    [[ $(os_release ID) == debian ]] && command -v apt-get >/dev/null &&
        { [[ -z $(os_release VERSION_ID) ]] || at_least "$(os_release VERSION_ID)" 12; }
}

# Whether Debian's backports should bring QEMU: Debian 12, and none or an old one is here.
wants_backports() {
    [[ $(os_release VERSION_ID) == 12 ]] && ! at_least "$(qemu_version)" "$QEMU_GOOD" &&
        { has_backports || backports_line >/dev/null; }
}

# Makes sure that all of the table is there; ends the script where something needed cannot be had.
install_system() {
    local backports=no log
    find_missing
    ! is_debian || ! wants_backports || backports=yes
    [[ ${#missing[@]} -gt 0 || $backports == yes ]] || return 0
    if ! is_debian; then
        say "Missing on this system ($(os_release PRETTY_NAME)):"
        tell_missing
        say 'As the administrator, run:'
        tell_how
        ! must_is_missing || die 'something needed is missing (see above); then run script/setup again'
        return 0
    fi
    if ! can_be_root; then
        [[ ${#missing[@]} -eq 0 ]] || { say 'Missing on this system:' && tell_missing; }
        [[ $backports == no || -z $(qemu_version) ]] ||
            say "QEMU $(qemu_version) works, but without KVM a newer one is needed to move running VMs"
        say 'As root (you are not, and sudo is not to be had), run:'
        debian_commands "$backports" | sed 's/^/  /'
        ! must_is_missing || die 'something needed is missing (see above); then run script/setup again'
        return 0
    fi
    step 'install system packages (this can take a few minutes)'
    log=$(mktemp)
    # shellcheck disable=SC2064 # the name as it is now
    trap "rm -f '$log'" EXIT
    if ! debian_commands "$backports" | run_as_root; then
        [[ $backports == yes ]] || die 'apt-get failed (see above)'
        say 'note: the backports of Debian 12 cannot be used; taking its own QEMU 7.2, which runs VMs,' \
            'but without KVM cannot move running ones'
        [[ ! -e $BACKPORTS_LIST ]] || printf 'rm %s\n' "$BACKPORTS_LIST" | run_as_root || true
        debian_commands no | run_as_root || die 'apt-get failed (see above)'
    fi
    hash -r
    find_missing
    [[ ${#missing[@]} -eq 0 ]] || { say 'Still missing:' && tell_missing; }
    ! must_is_missing || die 'something needed is still missing (see above)'
}

show_system() { # each row of the table: is it there?
    local row level check what
    while IFS= read -r row; do
        IFS='|' read -r level check what _ <<<"$row"
        # shellcheck disable=SC2086
        if is_there $check; then say "  ok       $what"; else say "  MISSING  $what ($level be there)"; fi
    done <<<"$NEEDS"
    printf '  %s; QEMU %s; .venv: Python %s\n' "$(os_release PRETTY_NAME)" \
        "$(qemu_version | grep . || echo none)" "$(python_version | grep . || echo none)"
}
