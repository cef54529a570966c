"""`tapeout members`: the people of an organization, and the links that let others in."""

from typing import Any

import click

from app.cli.client import Box, Refused
from app.cli.listings import print_table

ROLE = click.Choice(["owner", "admin", "member", "viewer"])


@click.group(invoke_without_command=True)
@click.pass_context
def members(context: click.Context) -> None:
    """List the people of your organization; `invite`, `role` and `remove` change them."""
    if context.invoked_subcommand is not None:
        return
    rows = [
        [member["email"], member["role"], member["created_at"][:10]]
        for member in Box().json("GET", "/api/members")["members"]
    ]
    print_table(["E-MAIL", "ROLE", "SINCE"], rows)


@members.command()
@click.option("--role", type=ROLE, default="member", show_default=True)
@click.option("--for", "note", default="", help="A name, to know the link by.")
@click.option("--hours", type=int, default=72, show_default=True, help="How long it works.")
def invite(role: str, note: str, hours: int) -> None:
    """Print a link that lets one person in, once. The box sends nothing: pass it on yourself."""
    body = {"role": role, "note": note, "hours": hours}
    click.echo(Box().json("POST", "/api/members/invitations", json=body)["url"])


@members.command()
def invitations() -> None:
    """List the links that can still be used."""
    rows = [
        [each["id"], each["note"], each["role"], each["created_by"], each["expires_at"][:16]]
        for each in Box().json("GET", "/api/members/invitations")["invitations"]
    ]
    print_table(["ID", "FOR", "ROLE", "BY", "ENDS (UTC)"], rows)


@members.command()
@click.argument("invitation_id")
def revoke(invitation_id: str) -> None:
    """Make a link useless."""
    box = Box()
    box.checked(box.request("DELETE", f"/api/members/invitations/{invitation_id}"))
    click.echo(f"{invitation_id} is revoked.")


@members.command()
@click.argument("email")
@click.argument("role", type=ROLE)
def role(email: str, role: str) -> None:
    """Change what a member may do."""
    box = Box()
    path = f"/api/members/{find_member(box, email)['user_id']}"
    box.json("PATCH", path, json={"role": role})
    click.echo(f"{email} is {role}.")


@members.command()
@click.argument("email")
def remove(email: str) -> None:
    """End a membership and its sessions at once; keys that they know stay."""
    box = Box()
    box.checked(box.request("DELETE", f"/api/members/{find_member(box, email)['user_id']}"))
    click.echo(f"{email} is no member any more. Revoke the keys that they know.")


def find_member(box: Box, email: str) -> dict[str, Any]:
    """Raises `Refused`."""
    for member in box.json("GET", "/api/members")["members"]:
        if member["email"] == email.strip().lower():
            return member
    raise Refused(f"{email} is no member; `tapeout members` lists them.")
