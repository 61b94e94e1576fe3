"""What a copy-on-write workspace needs of the host. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sandbox.host import HostFacts
    from sandbox.spec import CallSpec


def refusal(call: CallSpec, facts: HostFacts) -> str:
    """Why this host cannot lay a writable layer over a directory; empty when it can, or nobody asks."""
    overlay = facts.overlay_in_userns
    if call.workspace.mode != "cow" or facts.is_root_like or overlay.ok:
        return ""
    return f"a cow workspace needs overlays in user namespaces ({overlay.reason}); workspace modes rw and ro do not"


def notes(call: CallSpec, facts: HostFacts) -> tuple[str, ...]:
    """What will not work in the layer.

    In a user namespace overlayfs marks a directory that hides another by a user.* attribute, which tmpfs has since
    Linux 6.6; without it the removal of a directory of the host's is EIO (ovl_set_opaque() in fs/overlayfs).
    """
    if call.workspace.mode != "cow" or facts.is_root_like or facts.tmpfs_attributes.ok:
        return ()
    return ("cow: directories that the host has cannot be removed or renamed (EIO): Linux 6.6 or root can",)
