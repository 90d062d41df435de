# Run by mmdebstrap in the half-made system ($1), before the kernel and all else is installed.
set -eu
root=$1
# An initramfs for virtual machines: small, and so quickly unpacked.
mkdir -p "$root/etc/initramfs-tools/conf.d" "$root/usr/share/initramfs-tools/modules.d"
printf 'MODULES=list\nCOMPRESS=zstd\nRESUME=none\n' \
	> "$root/etc/initramfs-tools/conf.d/undercroft"
printf '%s\n' virtio_pci virtio_mmio virtio_blk virtio_scsi sd_mod ahci nvme ext4 \
	> "$root/usr/share/initramfs-tools/modules.d/undercroft"
