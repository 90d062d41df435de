# Run by mmdebstrap in the finished system ($1): settings, a quick boot, and no identity.
set -eu
root=$1
write() { mkdir -p "$root/$(dirname "$1")" && cat > "$root/$1"; }

# --- Disks, consoles, names ---
write etc/fstab <<'END'
LABEL=debian-root / ext4 defaults,noatime,errors=remount-ro 0 1
LABEL=ESP /boot/efi vfat umask=0077,noauto,nofail 0 2
END
mkdir -p "$root/boot/efi"
echo debian > "$root/etc/hostname"
printf '127.0.0.1 localhost\n127.0.1.1 debian\n::1 localhost ip6-localhost ip6-loopback\n' \
	> "$root/etc/hosts"
echo 'LANG=C.UTF-8' > "$root/etc/default/locale"
chroot "$root" passwd --quiet --lock root

# --- Boot loader for BIOS; its first two parts go onto the disk outside of any file system ---
write boot/grub/early.cfg <<'END'
serial --unit=0 --speed=115200
terminal_input serial console
terminal_output serial console
search.fs_label debian-root root
set prefix=($root)/boot/grub
END
write boot/grub/grub.cfg <<'END'
set timeout=0
menuentry "Debian" {
	search --no-floppy --label debian-root --set=root
	linux /vmlinuz root=LABEL=debian-root ro console=tty0 console=ttyS0,115200 no_timer_check quiet
	initrd /initrd.img
}
END
chroot "$root" grub-mkimage --format=i386-pc --output=/boot/grub/core.img \
	--config=/boot/grub/early.cfg --prefix=/boot/grub \
	biosdisk part_gpt ext2 normal configfile linux search search_label \
	serial terminal test echo ls cat boot reboot halt minicmd

# --- Network: DHCP on every adapter, by systemd-networkd; nothing else speaks ---
# cloud-init starts Python at each of its stages, which costs seconds without hardware
# virtualization. The one before the network would only write what is written here already. (From
# 24.3 on a single process serves all stages, and waits for each.)
[ -e "$root/lib/systemd/system/cloud-init-main.service" ] ||
	chroot "$root" systemctl --quiet mask cloud-init-local.service
write etc/cloud/cloud.cfg.d/10_undercroft.cfg <<'END'
datasource_list: [ NoCloud, None ]
datasource:
  NoCloud:
    fs_label: cidata
network:
  config: disabled
manage_etc_hosts: true
locale: C.UTF-8
ssh_genkeytypes: [ ed25519, ecdsa ]
ssh_quiet_keygen: true
no_ssh_fingerprints: true
ssh:
  emit_keys_to_console: false
apt:
  preserve_sources_list: true
system_info:
  network:
    renderers: [ networkd ]
    activators: [ networkd ]
cloud_init_modules:
 - bootcmd
 - write-files
 - growpart
 - resizefs
 - disk_setup
 - mounts
 - set_hostname
 - update_hostname
 - update_etc_hosts
 - ca-certs
 - users-groups
 - ssh
cloud_config_modules:
 - ssh-import-id
 - locale
 - set-passwords
 - apt-configure
 - timezone
 - runcmd
cloud_final_modules:
 - package-update-upgrade-install
 - write-files-deferred
 - scripts-per-once
 - scripts-per-boot
 - scripts-per-instance
 - scripts-user
 - phone-home
 - final-message
 - power-state-change
END
write etc/systemd/network/90-default.network <<'END'
[Match]
Name=en* eth*

[Network]
DHCP=ipv4
IPv6AcceptRA=no
END
write etc/systemd/resolved.conf.d/quiet.conf <<'END'
[Resolve]
FallbackDNS=
LLMNR=no
MulticastDNS=no
DNSSEC=no
END
write etc/systemd/system/systemd-networkd-wait-online.service.d/any.conf <<'END'
[Service]
ExecStart=
ExecStart=/lib/systemd/systemd-networkd-wait-online --any --timeout=10
END
ln -sf ../run/systemd/resolve/stub-resolv.conf "$root/etc/resolv.conf"
chroot "$root" systemctl --quiet enable systemd-networkd.service
# Timers that would fetch or write by themselves.
chroot "$root" systemctl --quiet mask apt-daily.timer apt-daily-upgrade.timer \
	e2scrub_all.timer e2scrub_reap.service
write etc/systemd/journald.conf.d/size.conf <<'END'
[Journal]
SystemMaxUse=64M
END
# Drivers that a VM has no use for, or only when asked (modprobe kvm_amd still loads it): udev would
# load them at every boot, megabytes whose signatures are checked.
write etc/modprobe.d/undercroft.conf <<'END'
blacklist cfg80211
blacklist kvm_amd
blacklist kvm_intel
blacklist iTCO_wdt
blacklist i2c_i801
blacklist lpc_ich
blacklist pcspkr
blacklist psmouse
END
# What cloud-init has to say goes to the journal, not into the midst of somebody's session.
for unit in cloud-init cloud-init-main cloud-config cloud-final; do
	write "etc/systemd/system/$unit.service.d/quiet.conf" <<-'END'
		[Service]
		StandardOutput=journal
	END
done
# Host keys where cloud-init has not made them.
write etc/systemd/system/ssh.service.d/host-keys.conf <<'END'
[Service]
ExecStartPre=
ExecStartPre=/bin/sh -c 'ls /etc/ssh/ssh_host_*_key > /dev/null 2>&1 || ssh-keygen -q -t ed25519 -N "" -f /etc/ssh/ssh_host_ed25519_key'
ExecStartPre=/usr/sbin/sshd -t
END

# --- No identity: every VM makes its own ---
rm -f "$root"/etc/ssh/ssh_host_* "$root/var/lib/systemd/random-seed" \
	"$root/var/lib/dbus/machine-id" "$root/etc/hostname.bak"
ln -s /etc/machine-id "$root/var/lib/dbus/machine-id"
: > "$root/etc/machine-id"
rm -rf "$root"/var/log/*.log "$root"/var/log/apt/* "$root"/var/lib/apt/lists/* \
	"$root"/var/cache/apt/*.bin "$root"/vmlinuz.old "$root"/initrd.img.old
rm -f "$root/etc/dpkg/dpkg.cfg.d/99mmdebstrap" "$root/etc/apt/apt.conf.d/99mmdebstrap"
find "$root/var/log/journal" -mindepth 1 -delete 2> /dev/null || true
# All is up to date: systemd need not rebuild its caches at the first boot.
touch "$root/etc/.updated" "$root/var/.updated"
touch -d '1 hour ago' "$root/usr"
