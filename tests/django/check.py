"""What docs/snippets/django_asgi.py does, in a process of its own: Django is set up once, for good."""

import asyncio
import runpy
import sys

import pytest

from asgi_ws import testing

app = runpy.run_path(sys.argv[1])["app"]

from django.contrib.auth.models import User  # noqa: E402  not before Django is set up
from django.core.management import call_command  # noqa: E402
from django.test import Client  # noqa: E402


def cookie_of(name: str) -> str:
    client = Client()
    client.force_login(User.objects.create_user(name))
    return f"sessionid={client.cookies['sessionid'].value}"


async def main(cookie: str) -> None:
    assert (await testing.request(app, "GET", "/")).text == "hello"
    for headers in ({}, {"Cookie": "sessionid=guessed"}):
        with pytest.raises(testing.Refused, match="401"):
            async with testing.connect(app, "/chat/lobby", headers=headers):
                pass
    async with testing.connect(app, "/chat/lobby", headers={"Cookie": cookie}) as ann:
        await ann.send("hello")
        assert await ann.receive() == "ann: hello"


call_command("migrate", verbosity=0)
asyncio.run(main(cookie_of("ann")))
