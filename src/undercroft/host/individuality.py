"""Making a clone an individual: what its guest still holds of the identity of its source is changed
through its agent, before its networks are connected.

What can be done depends on the guest; what cannot is told (`VMStatus.shares`).
"""

from __future__ import annotations

import asyncio
import base64
import secrets
import shlex
import uuid
from collections.abc import Mapping

import structlog
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from undercroft.host.outcome import change_status
from undercroft.hypervisor.machine import QemuMachine
from undercroft.model.errors import UndercroftError
from undercroft.model.vm import VM, Identity

__all__ = ["ALL_SHARED", "individual", "make_individual"]

log = structlog.get_logger(__name__)

AGENT_PATIENCE = 10.0  # seconds for the agent of a fork to answer
SCRIPT_PATIENCE = 60.0
ALL_SHARED = ("hostname", "machine-id", "SSH host keys", "boot id", "MAC address")

# Each step that fails says what the guest still shares. Words are kept few: under emulation every
# program that the guest starts costs it some hundredths of a second.
_BOTH = r"""
exec 2>/dev/null
PATH=/usr/sbin:/usr/bin:/sbin:/bin
left() { echo "shares: $1"; }
if [ -s /etc/machine-id ]; then
  echo "$id" > /etc/machine-id || left machine-id
  [ -f /var/lib/dbus/machine-id ] && ! [ -L /var/lib/dbus/machine-id ] &&
    echo "$id" > /var/lib/dbus/machine-id
fi
"""
_FORKED = r"""
read -r old < /proc/sys/kernel/hostname
echo "$name" > /proc/sys/kernel/hostname || left hostname
if [ -f /etc/hostname ]; then echo "$name" > /etc/hostname; fi
if [ -f /etc/hosts ] && [ "$old" != "$name" ]; then
  while read -r line; do
    case " $line " in *" $old "*|*"	$old "*)
      sed -i "s/\([[:space:]]\)$old\b/\1$name/g" /etc/hosts; break ;;
    esac
  done < /etc/hosts
fi
echo "$boot" > /run/undercroft-boot-id && chmod 444 /run/undercroft-boot-id &&
  mount --bind /run/undercroft-boot-id /proc/sys/kernel/random/boot_id || left "boot id"
echo "$seed" > /dev/urandom
reseed='open(F, ">", "/dev/urandom") and ioctl(F, 0x5207, 0) or exit 1'
perl -e "$reseed" || /sbin/reseed ||
  python3 -c 'import fcntl; fcntl.ioctl(open("/dev/urandom", "w"), 0x5207)' ||
  left "random numbers (for a minute)"
for type in ed25519 ecdsa rsa dsa; do
  file=/etc/ssh/ssh_host_${type}_key
  [ -f "$file" ] || continue
  eval "new=\$key_$type public=\$public_$type"
  if [ -n "$new" ]; then
    (umask 077; echo "$new" > "$file") && echo "$public" > "$file.pub" || left "SSH host keys"
  else
    rm -f "$file" "$file.pub"
    (ssh-keygen -q -t $type -N '' -f "$file" < /dev/null > /dev/null &)
  fi
done
for net in /sys/class/net/*; do
  read -r mac < "$net/address"
  eval "new=\$mac_$(echo "$mac" | tr -d :)"
  [ -n "$new" ] || continue
  link=${net##*/}
  ip link set dev "$link" down; ip link set dev "$link" address "$new" || left "MAC address"
  ip link set dev "$link" up
done
cloud=/var/lib/cloud
if [ -L $cloud/instance ]; then
  cp -a "$(readlink -f $cloud/instance)" "$cloud/instances/$instance" &&
    ln -sfn "$cloud/instances/$instance" $cloud/instance
  echo "$instance" > $cloud/data/instance-id
fi
if [ -d /run/systemd/system ]; then
  (systemctl --no-block try-restart systemd-journald; networkctl renew $links) > /dev/null &
elif [ -f /etc/udhcpc.script ]; then
  for pid in $(pidof udhcpc); do kill -USR2 $pid; kill -USR1 $pid; done
fi
"""


async def make_individual(
    machine: QemuMachine, vm: VM, *, forked: bool, old_macs: Mapping[str, str] | None = None
) -> tuple[str, ...]:
    """Gives a clone an identity of its own; what it still shares with its source.

    ``forked``: it goes on from what its source had in memory, else it has booted since.
    ``old_macs``: MAC addresses of the source's adapters, and what they are to become.
    """
    agent = machine.agent
    if agent is None or not await agent.ping(timeout=AGENT_PATIENCE):
        return ALL_SHARED
    script = await asyncio.to_thread(_script, vm, forked, old_macs or {})
    try:
        result = await agent.exec(["/bin/sh"], input=script.encode(), timeout=SCRIPT_PATIENCE)
    except UndercroftError as error:
        log.warning("a clone keeps its source's identity", vm=vm.meta.name, error=error.message)
        return ALL_SHARED
    lines = result.stdout[:4096].decode(errors="replace").splitlines()
    shares = {line.removeprefix("shares: ")[:60] for line in lines if line.startswith("shares: ")}
    if result.exit_code != 0:
        log.warning("making an individual failed", vm=vm.meta.name, code=result.exit_code)
        return ALL_SHARED
    return tuple(sorted(shares))


def individual(vm: VM, shares: tuple[str, ...]) -> VM:
    """The record of a clone whose identity was seen to."""
    found = Identity.PARTIAL if shares else Identity.OWN
    return change_status(vm, identity=found, shares=shares)


def _script(vm: VM, forked: bool, macs: Mapping[str, str]) -> str:
    values = {"id": uuid.uuid4().hex}
    if forked:
        values |= {
            "name": vm.spec.guest.hostname or vm.meta.name,
            "boot": str(uuid.uuid4()),
            "seed": base64.b64encode(secrets.token_bytes(48)).decode(),
            "instance": vm.meta.id,
            **_host_keys(vm.meta.name),
            **{f"mac_{old.replace(':', '').lower()}": new for old, new in macs.items()},
        }
    lines = [f"{name}={shlex.quote(value)}" for name, value in values.items()]
    return "\n".join([*lines, _BOTH, _FORKED if forked else "", "exit 0", ""])


def _host_keys(name: str) -> dict[str, str]:
    """New SSH host keys, made here: a guest under emulation takes seconds."""
    keys: dict[str, str] = {}
    for type, key in (
        ("ed25519", ed25519.Ed25519PrivateKey.generate()),
        ("ecdsa", ec.generate_private_key(ec.SECP256R1())),
    ):
        private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
        public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        keys[f"key_{type}"] = private.decode().strip()
        keys[f"public_{type}"] = f"{public.decode()} root@{name}"
    return keys
