"""Making a clone an individual: what its guest still holds of the identity of its source is changed
through its agent, before its networks are connected.

What can be done depends on the guest; what cannot is told (`VMStatus.shares`).
"""

from __future__ import annotations

import asyncio
import base64
import secrets
import shlex
import time
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

from undercroft.host.identity import Steps
from undercroft.host.outcome import change_status
from undercroft.hypervisor.machine import QemuMachine
from undercroft.model.errors import UndercroftError
from undercroft.model.vm import VM, Identity

__all__ = ["ALL_SHARED", "host_keys", "individual", "make_individual"]

log = structlog.get_logger(__name__)

HELPER_PATIENCE = 10.0  # seconds for the helper in the guest, which needs thousandths
PATIENCE = 60.0  # seconds for the guest to do all of it
ALL_SHARED = ("hostname", "machine-id", "SSH host keys", "boot id", "MAC address")

# Each step that fails says what the guest still shares. Every program that is started costs a guest
# under emulation some hundredths of a second, so nearly all of it is done by the shell itself.
_BOTH = r"""
exec 2>/dev/null
PATH=/usr/sbin:/usr/bin:/sbin:/bin
umask 022
left() { echo "shares: $1"; }
if [ -s /etc/machine-id ]; then
  echo "$id" > /etc/machine-id || left machine-id
  if [ -f /var/lib/dbus/machine-id ] && ! [ -L /var/lib/dbus/machine-id ]; then
    echo "$id" > /var/lib/dbus/machine-id
  fi
fi
"""
_FORKED = r"""
read -r old < /proc/sys/kernel/hostname
echo "$name" > /proc/sys/kernel/hostname || left hostname
if [ -f /etc/hostname ]; then echo "$name" > /etc/hostname; fi
if [ -f /etc/hosts ] && [ "$old" != "$name" ]; then
  while read -r line; do
    case "$line " in *[[:space:]]"$old"[[:space:]]*)
      sed -i "s/\([[:space:]]\)$old\b/\1$name/g" /etc/hosts; break ;;
    esac
  done < /etc/hosts
fi
echo "$boot" > /run/undercroft-boot-id &&
  mount --bind /run/undercroft-boot-id /proc/sys/kernel/random/boot_id || left "boot id"
date -u -s "@$now" > /dev/null
echo "$seed" > /dev/urandom
if [ -x /usr/bin/perl ]; then
  perl -e 'open(F, ">", "/dev/urandom") && ioctl(F, 0x5207, 0) || exit 1'
else
  python3 -c 'import fcntl; fcntl.ioctl(open("/dev/urandom", "w"), 0x5207)'
fi || left "random numbers (for a minute)"
for type in ed25519 ecdsa rsa dsa; do
  file=/etc/ssh/ssh_host_${type}_key
  [ -f "$file" ] || continue
  eval "new=\$key_$type public=\$public_$type"
  if [ -n "$new" ]; then
    { echo "$new" > "$file" && echo "$public" > "$file.pub"; } || left "SSH host keys"
  else
    rm -f "$file" "$file.pub"
    (ssh-keygen -q -t $type -N '' -f "$file" < /dev/null > /dev/null &)
  fi
done
for net in /sys/class/net/*; do
  read -r mac < "$net/address"
  renamed "$mac"
  [ -n "$new" ] || continue
  link=${net##*/}
  ip link set dev "$link" address "$new" || {
    ip link set dev "$link" down
    ip link set dev "$link" address "$new" || left "MAC address"
    ip link set dev "$link" up
  }
done
cloud=/var/lib/cloud
if [ -L $cloud/instance ]; then
  cp -a "$(readlink -f $cloud/instance)" "$cloud/instances/$instance" &&
    ln -sfn "$cloud/instances/$instance" $cloud/instance
  echo "$instance" > $cloud/data/instance-id
fi
if [ -d /run/systemd/system ]; then
  (systemctl --no-block try-restart systemd-journald > /dev/null &)
fi
"""


async def make_individual(
    machine: QemuMachine,
    vm: VM,
    *,
    forked: bool,
    old_macs: Mapping[str, str] | None = None,
    steps: Steps | None = None,
) -> tuple[str, ...]:
    """Gives a clone an identity of its own; what it still shares with its source.

    ``forked``: it goes on from what its source had in memory, else it has booted since.
    ``old_macs``: MAC addresses of the source's adapters, and what they are to become.
    ``steps`` were sent to the helper in the guest; only where there is none, or it does not answer,
    the agent runs a script.
    """
    helper = machine.helper
    if helper is not None and steps is not None:
        try:
            return steps.shares(await helper.receive(steps.batch, HELPER_PATIENCE))
        except UndercroftError as error:
            log.warning("the helper does nothing", vm=vm.meta.name, error=error.message)
    agent = machine.agent
    if agent is None or agent.channel.present is False:
        return ALL_SHARED
    script = await asyncio.to_thread(_script, vm, forked, old_macs or {})
    try:
        result = await agent.exec(["/bin/sh"], input=script.encode(), timeout=PATIENCE)
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
            "now": str(int(time.time())),
            **host_keys(vm.meta.name),
        }
    lines = [f"{name}={shlex.quote(value)}" for name, value in values.items()]
    cases = "".join(f"{old.lower()}) new={new} ;; " for old, new in macs.items())
    lines.append(f"renamed() {{ new=; case $1 in {cases}esac; }}")
    return "\n".join([*lines, _BOTH, _FORKED if forked else "", "exit 0", ""])


def host_keys(name: str) -> dict[str, str]:
    """New SSH host keys (``key_TYPE``, ``public_TYPE``), made here: a guest under emulation takes
    seconds."""
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
