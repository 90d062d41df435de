import pytest

from undercroft.model.errors import InvalidError
from undercroft.storage.build.apt import Source, choose_sources, find_sources, parse_uris

TABLE = """\
http://mirror.example/debian\tbookworm\tDebian\tDebian\tPackages
http://mirror.example/debian\tbookworm\tDebian\tDebian\tTranslations
http://mirror.example/debian\tbookworm-updates\tDebian\tDebian\tPackages
http://mirror.example/sec\tbookworm-security\tDebian\tDebian-Security\tPackages
http://mirror.example/debian\tbookworm-backports\tDebian Backports\tDebian Backports\tPackages
https://other.example/tools\tnodistro\t. nodistro\tTools\tPackages
"""


def test_sources_come_from_the_hosts_own_mirror():
    assert choose_sources(TABLE, "trixie") == (
        Source("http://mirror.example/debian", "trixie"),
        Source("http://mirror.example/debian", "trixie-updates"),
        Source("http://mirror.example/sec", "trixie-security"),
    )


def test_sources_before_the_first_update():
    # Without lists apt leaves the fields that come from the Release file as they were written.
    table = TABLE.replace("\tDebian\tDebian\t", "\t$(ORIGIN)\t$(LABEL)\t").replace(
        "\tDebian\tDebian-Security\t", "\t$(ORIGIN)\t$(LABEL)\t"
    )
    assert choose_sources(table, "bookworm")[0].site == "http://mirror.example/debian"
    assert choose_sources(table, "bookworm")[2].site == "http://mirror.example/sec"


def test_host_without_debian():
    with pytest.raises(InvalidError) as caught:
        choose_sources("http://u.example/ubuntu\tnoble\tUbuntu\tUbuntu\tPackages\n", "bookworm")
    assert "--mirror" in (caught.value.action or "")


async def test_given_mirror():
    assert await find_sources("trixie", "http://m.example/debian/") == (
        Source("http://m.example/debian", "trixie"),
    )
    for nonsense in ("ftp:/x", "http://a b", "deb [trusted=yes] http://x", "", "http://x\nevil"):
        with pytest.raises(InvalidError):
            await find_sources("trixie", nonsense)


def test_uris():
    text = (
        "Reading package lists...\n"
        "'http://m/libc6_2.36-9%2bdeb12u1_amd64.deb' libc6_2.36-9+deb12u1_amd64.deb 27 MD5Sum:0\n"
        "'http://m/x_1.5-2_amd64.deb' x_1%3a1.5-2_amd64.deb 5 \n"
    )
    first, second = parse_uris(text)
    assert (first.name, first.version, first.size) == ("libc6", "2.36-9+deb12u1", 27)
    assert (second.name, second.version, second.file) == ("x", "1:1.5-2", "x_1%3a1.5-2_amd64.deb")
