"""Where banks are: a folder and a real object store do the same, whole or not at all, and say why they cannot."""

import errno
import hashlib
import http.client
import importlib.util
import os
import resource
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas import object_store
from schemas.errors import BankError, BankFormatError, InputError, StorageFullError
from schemas.object_store import ObjectStore
from schemas.stores import BankStore, LocalStore, StoreError, explain_write_errors, open_store
from tests.test_storage import NOWHERE, endpoint, request  # noqa: F401

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("moto") is None, reason="moto, the object store, is missing"),
    pytest.mark.usefixtures("endpoint"),
]

ROOT = Path(__file__).parents[1]
BUCKET = "corpora"
"""The bucket that the server of :mod:`tests.test_storage` starts with."""

Place = Callable[[], str]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the stores of a test keep copies."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def remote(tmp_path: Path) -> ObjectStore:
    return ObjectStore(f"s3://{BUCKET}/{tmp_path.name}/bank")


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, remote: ObjectStore) -> BankStore:
    return LocalStore(tmp_path / "bank") if request.param == "local" else remote


class Proxy:
    """A server before the object store that notes what is asked, and can lose answers.

    Attributes:
        asked: method and path of the requests so far.
        lost: methods whose answers are lost; the request itself is carried out.
    """

    def __init__(self, target: str) -> None:
        self.asked: list[tuple[str, str]] = []
        self.lost: set[str] = set()
        proxy, host = self, urlsplit(target).netloc

        class Handler(BaseHTTPRequestHandler):
            def forward(self) -> None:
                content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                proxy.asked.append((self.command, self.path))
                connection = http.client.HTTPConnection(host)
                connection.request(self.command, self.path, content, dict(self.headers))
                with connection.getresponse() as answer:
                    body = answer.read()
                    if self.command in proxy.lost:
                        self.close_connection = True
                        return
                    self.send_response(answer.status)
                    for name, value in answer.getheaders():
                        if name.lower() not in ("transfer-encoding", "connection", "content-length", "date", "server"):
                            self.send_header(name, value)
                    length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(body))
                    self.send_header("Content-Length", length or "0")
                    self.end_headers()
                    self.wfile.write(body)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def count(self, method: str) -> int:
        return sum(asked == method for asked, _ in self.asked)


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    between = Proxy(os.environ["AWS_ENDPOINT_URL"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", between.url)
    yield between
    between.server.shutdown()
    between.server.server_close()


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def list_all(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def check_sentence(error: pytest.ExceptionInfo[BankError]) -> None:
    assert "\n" not in str(error.value)
    assert "Debug source" not in str(error.value)
    assert len(str(error.value)) < 400


# Both stores ----------------------------------------------------------------------------------------------------------

NAMES = ["a.json", "b/a.json", "b/c/ü %20#+&=é [x] 日.parquet", "b.json", "b/c/d.tmp"]
FOLDERS = ["", "b", "b/", "b/c", "nothing"]
CONTENTS = st.sampled_from([b"", b"x", b"0123456789" * 7])


def take_step(store: BankStore, step: str, name: str, content: bytes, start: int, size_bytes: int) -> object:
    """Returns what a method returns, or the kind of its error."""
    try:
        match step:
            case "create":
                store.create(name, content)
            case "replace":
                store.replace(name, content)
            case "remove":
                store.remove([name, NAMES[0]])
            case "read":
                return store.read(name)
            case "read a range":
                return store.read_range(name, start, size_bytes)
            case "size":
                return store.get_size(name)
            case _:
                return [store.list_files(folder) for folder in FOLDERS]
    except (FileExistsError, FileNotFoundError) as error:
        return type(error)
    return None


STEPS = ["create", "replace", "remove", "read", "read a range", "size", "list"]


@settings(max_examples=15)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(STEPS), st.sampled_from(NAMES), CONTENTS, st.integers(0, 80), st.integers(0, 80)),
        max_size=12,
    )
)
def test_an_object_store_does_what_a_folder_does(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, str, bytes, int, int]]
) -> None:
    folder = tmp_path_factory.mktemp("steps")
    stores: list[BankStore] = [LocalStore(folder), ObjectStore(f"s3://{BUCKET}/steps/{folder.name}/")]
    for step in [*steps, *(("read", name, b"", 0, 0) for name in NAMES)]:
        first, second = (take_step(store, *step) for store in stores)
        assert first == second, step


def test_a_new_place_is_empty(store: BankStore) -> None:
    assert store.list_files() == []
    assert store.list_files("manifests") == []
    assert store.get_size("a.json") is None
    store.remove([])
    store.remove(["a.json", "b/c.json"])
    for action in (
        lambda: store.read("a.json"),
        lambda: store.read_range("a.json", 0, 5),
        lambda: store.read_range("a.json", 0, 0),
        lambda: store.localize("a.json", digest(b"")),
    ):
        with pytest.raises(FileNotFoundError):
            action()


def test_a_file_is_created_once(store: BankStore) -> None:
    store.create("manifests/1.json", b"one")
    with pytest.raises(FileExistsError):
        store.create("manifests/1.json", b"two")
    with pytest.raises(FileExistsError):
        store.create("manifests/1.json", b"one")
    assert store.read("manifests/1.json") == b"one"
    store.replace("manifests/1.json", b"three")
    assert store.read("manifests/1.json") == b"three"
    assert store.get_size("manifests/1.json") == 5
    assert store.list_files() == store.list_files("manifests") == ["manifests/1.json"]
    store.remove(["manifests/1.json"])
    store.create("manifests/1.json", b"four")
    assert store.read("manifests/1.json") == b"four"


@pytest.mark.parametrize("start", [0, 3, 9, 10, 11, 1000])
@pytest.mark.parametrize("size_bytes", [0, 1, 7, 10, 1000])
def test_a_range_is_a_slice(store: BankStore, start: int, size_bytes: int) -> None:
    store.replace("a.json", b"0123456789")
    assert store.read_range("a.json", start, size_bytes) == b"0123456789"[start : start + size_bytes]


def test_a_folder_is_no_file(store: BankStore) -> None:
    store.create("a/b.json", b"x")
    assert store.get_size("a") is None
    for action in (lambda: store.read("a"), lambda: store.read_range("a", 0, 1), lambda: store.localize("a", "0" * 64)):
        with pytest.raises(FileNotFoundError):
            action()
    assert store.get_size("a/b.json/c") is None
    with pytest.raises(FileNotFoundError):
        store.read("a/b.json/c")


def test_of_those_who_create_at_once_one_wins(store: BankStore) -> None:
    num_writers = 4
    for version in range(8):
        name = f"manifests/{version}.json"
        barrier = threading.Barrier(num_writers)

        def write(number: int, name: str = name, barrier: threading.Barrier = barrier) -> bool:
            barrier.wait()
            try:
                store.create(name, b"%d" % number * 5000)
            except FileExistsError:
                return False
            return True

        with ThreadPoolExecutor(num_writers) as pool:
            won = list(pool.map(write, range(num_writers)))
        assert sum(won) == 1
        assert store.read(name) == b"%d" % won.index(True) * 5000


def make_segment(folder: Path, *, seed: int = 0) -> dict[str, bytes]:
    contents = {f"{number:02}.parquet": bytes([number, seed]) * 1000 for number in range(12)}
    contents["deep/ü %20.faiss"] = b"index"
    contents["large.safetensors"] = os.urandom(1 << 10) * (9 << 10)
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return contents


def test_a_folder_is_published_whole(store: BankStore, tmp_path: Path) -> None:
    contents = make_segment(tmp_path / "made")
    store.publish(tmp_path / "made", "segments/s1")
    assert not (tmp_path / "made").exists()
    assert store.list_files("segments/s1") == store.list_files() == sorted(f"segments/s1/{name}" for name in contents)
    for name, content in contents.items():
        assert store.read(f"segments/s1/{name}") == content
        assert store.localize(f"segments/s1/{name}", digest(content)).read_bytes() == content


def test_publishing_replaces_what_was_there(store: BankStore, tmp_path: Path) -> None:
    make_segment(tmp_path / "made")
    store.publish(tmp_path / "made", "segments/s1")
    store.create("segments/s10/other.json", b"another")
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "03.parquet").write_bytes(b"new")
    store.publish(tmp_path / "made", "segments/s1")
    assert store.list_files() == ["segments/s1/03.parquet", "segments/s10/other.json"]
    assert store.read("segments/s1/03.parquet") == b"new"


def test_removing_takes_what_is_there(store: BankStore, tmp_path: Path) -> None:
    make_segment(tmp_path / "made")
    store.publish(tmp_path / "made", "segments/s1")
    store.create("segments/s2/a.json", b"stays")
    store.remove([*store.list_files("segments/s1"), "segments/s1/gone.json", "segments/s3/gone.json"])
    assert store.list_files() == ["segments/s2/a.json"]


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/x", "a/../../bank2/x"])
def test_no_name_leads_out(store: BankStore, tmp_path: Path, name: str) -> None:
    (tmp_path / "x").write_bytes(b"secret")
    store.create("a/b.json", b"x")
    actions: list[Callable[[], object]] = [
        lambda: store.read(name),
        lambda: store.read_range(name, 0, 1),
        lambda: store.get_size(name),
        lambda: store.localize(name, digest(b"secret")),
        lambda: store.create(name, b"y"),
        lambda: store.replace(name, b"y"),
        lambda: store.remove([name]),
        lambda: store.publish(tmp_path / "a", name),
        lambda: store.list_files(name),
    ]
    for number, action in enumerate(actions):
        if number == 7:
            make_segment(tmp_path / "a")
        with pytest.raises(BankError) as caught:
            action()
        check_sentence(caught)
    assert (tmp_path / "x").read_bytes() == b"secret"
    assert (tmp_path / "a" / "03.parquet").exists()


@pytest.mark.parametrize("name", ["a\0b.json", "a/\0"])
def test_a_zero_byte_in_a_name_is_a_known_error(store: BankStore, name: str) -> None:
    for action in (lambda: store.read(name), lambda: store.localize(name, "0" * 64), lambda: store.get_size(name)):
        with pytest.raises(BankError):
            action()


def test_a_store_is_found_by_its_place(tmp_path: Path) -> None:
    assert isinstance(open_store(tmp_path), LocalStore)
    assert isinstance(open_store(str(tmp_path)), LocalStore)
    for url in ("s3://corpora/some/bank", "s3://corpora/some/bank/", "s3://corpora/some/bank//"):
        store = open_store(url)
        assert isinstance(store, ObjectStore)
        assert store.url == "s3://corpora/some/bank"
        assert open_store(store) is store
    for url in ("hdfs://host/bank", "http://host/bank", "S3://corpora/bank"):
        with pytest.raises(InputError, match="give a folder or a URL that begins with one of s3://, gs://, az://"):
            open_store(url)


def test_a_whole_bucket_may_be_a_bank() -> None:
    request(f"{os.environ['AWS_ENDPOINT_URL']}/whole-bucket", "PUT")
    store = open_store("s3://whole-bucket/")
    store.create("a/b.json", b"x")
    assert (store.list_files(), store.list_files("a"), store.read("a/b.json")) == (["a/b.json"], ["a/b.json"], b"x")


# Folders --------------------------------------------------------------------------------------------------------------


def test_links_are_not_followed_out_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.json").write_bytes(b"secret")
    store = LocalStore(tmp_path / "bank")
    store.create("segments/s1/a.json", b"inside")
    for name, target in {
        "segments/s1/out.json": tmp_path / "outside" / "secret.json",
        "segments/s2": tmp_path / "outside",
        "segments/s1/in.json": tmp_path / "bank" / "segments" / "s1" / "a.json",
    }.items():
        (tmp_path / "bank" / name).symlink_to(target)
    for name in ("segments/s1/out.json", "segments/s2/secret.json"):
        for action in (store.read, store.get_size, lambda name: store.localize(name, "")):
            with pytest.raises(BankFormatError, match="leads out of the bank"):
                action(name)
    for action in (lambda name: store.remove([name]), lambda name: store.create(name, b"")):
        with pytest.raises(BankFormatError, match="leads out of the bank"):
            action("segments/s2/secret.json")
    assert store.read("segments/s1/in.json") == b"inside"
    # As files they are seen and can be removed, and only they.
    links = ["segments/s1/in.json", "segments/s1/out.json", "segments/s2"]
    assert store.list_files() == sorted([*links, "segments/s1/a.json"])
    store.remove(links)
    assert store.list_files() == ["segments/s1/a.json"]
    assert (tmp_path / "outside" / "secret.json").read_bytes() == b"secret"


def test_a_folder_that_is_a_link_is_a_bank(tmp_path: Path) -> None:
    LocalStore(tmp_path / "bank").create("a/b.json", b"x")
    (tmp_path / "link").symlink_to(tmp_path / "bank")
    store = LocalStore(tmp_path / "link")
    assert store.list_files() == ["a/b.json"]
    assert store.read("a/b.json") == b"x"


def test_a_file_in_the_place_of_a_folder_is_a_known_error(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "bank")
    store.create("manifests", b"a file")
    for action in (store.create, store.replace):
        with pytest.raises(StoreError, match="manifests is a file and must be a folder"):
            action("manifests/1.json", b"x")
    assert store.list_files("manifests/deep") == []
    assert store.get_size("manifests/1.json") is None


def test_a_folder_is_published_from_another_file_system(tmp_path: Path) -> None:
    other = Path("/dev/shm")
    if not other.is_dir() or not os.access(other, os.W_OK) or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system")
    made = other / f"memory3-{os.getpid()}"
    try:
        contents = make_segment(made)
        store = LocalStore(tmp_path / "bank")
        store.create("segments/s1/old.json", b"old")
        store.publish(made, "segments/s1")
        assert not made.exists()
        assert list_all(tmp_path / "bank" / "segments") == sorted(f"s1/{name}" for name in contents)
        assert {name: store.read(f"segments/s1/{name}") for name in contents} == contents
    finally:
        shutil.rmtree(made, ignore_errors=True)


READING = """
import ctypes, os, sys
libc = ctypes.CDLL(None)
sys.path.insert(0, sys.argv[2])
from schemas.stores import LocalStore, StoreError
try:
    open(os.path.join(sys.argv[1], "probe"), "w")
    sys.exit(3)  # it can be written: nothing would be tested
except OSError:
    pass
store = LocalStore(sys.argv[1])
assert store.list_files() == ["manifests/1.json"], store.list_files()
assert store.read("manifests/1.json") == b"one"
assert store.read_range("manifests/1.json", 1, 1) == b"n"
assert store.get_size("manifests/1.json") == 3
assert store.localize("manifests/1.json", "").read_bytes() == b"one"
assert not str(store.scratch).startswith(sys.argv[1])
for write in (lambda: store.create("manifests/2.json", b"x"), lambda: store.replace("manifests/1.json", b"x"),
              lambda: store.remove(["manifests/1.json"])):
    try:
        write()
    except StoreError as error:
        assert "cannot be written" in str(error), error
    else:
        raise AssertionError("written")
"""


def test_a_read_only_folder_is_read(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "bank")
    store.create("manifests/1.json", b"one")
    assert store.scratch == tmp_path / "bank"
    for folder in (tmp_path / "bank" / "manifests", tmp_path / "bank"):
        folder.chmod(0o555)
    # The superuser may write anywhere, unless the process has given that up for good before it starts.
    given_up = (
        "import ctypes, os, sys; libc = ctypes.CDLL(None); [libc.prctl(24, number, 0, 0, 0) for number in (1, 2)]"
    )
    command = f"{given_up}; os.execv(sys.executable, [sys.executable, '-c', *sys.argv[1:]])"
    arguments = [sys.executable, "-c", command, textwrap.dedent(READING), str(tmp_path / "bank"), str(ROOT)]
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    finally:
        for folder in (tmp_path / "bank", tmp_path / "bank" / "manifests"):
            folder.chmod(0o755)
    if done.returncode == 3:
        pytest.skip("this user may write to any folder")
    assert done.returncode == 0, done.stderr
    assert list_all(tmp_path / "bank") == ["manifests/1.json"]


# A full disk ----------------------------------------------------------------------------------------------------------


def limit_files(size_bytes: int, action: Callable[[], object]) -> None:
    """Calls an action while no file of this process may grow beyond a size: the disk is full for it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        action()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


FULL = "no space is left on the device of .*; nothing was committed: free some space"


def test_a_full_disk_leaves_nothing_half(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "bank")
    store.create("tags/a.json", b"old")
    for action in (
        lambda: store.create("manifests/1.json", b"x" * 5000),
        lambda: store.replace("tags/a.json", b"x" * 5000),
    ):
        with pytest.raises(StorageFullError, match=FULL):
            limit_files(1000, action)
        assert list_all(tmp_path) == ["bank/tags/a.json"]
        assert store.read("tags/a.json") == b"old"
    store.create("manifests/1.json", b"x" * 5000)


def test_a_cache_on_a_full_disk_keeps_nothing_half(remote: ObjectStore, cache: Path) -> None:
    content = os.urandom(1000) * 1000
    remote.create("a.faiss", content)
    with pytest.raises(StorageFullError, match=FULL):
        limit_files(100_000, lambda: remote.localize("a.faiss", digest(content)))
    assert list_all(cache) == []
    assert remote.localize("a.faiss", digest(content)).read_bytes() == content


FILLING = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from schemas.errors import StorageFullError
from schemas.stores import LocalStore
disk, made = Path(sys.argv[1]), Path(sys.argv[3])
store = LocalStore(disk / "bank")
store.create("manifests/1.json", b"old")
store.create("segments/s1/a.parquet", b"old")
def expect_full(action):
    try:
        action()
    except StorageFullError as error:
        assert "nothing was committed" in str(error)
    else:
        raise AssertionError("there was space")
    left = sorted(path.relative_to(disk).as_posix() for path in disk.rglob("*") if not path.is_dir())
    assert left == ["bank/manifests/1.json", "bank/segments/s1/a.parquet"], left
    assert store.read("manifests/1.json") == store.read("segments/s1/a.parquet") == b"old"
large = os.urandom(2 << 20)
made.mkdir()
(made / "a.parquet").write_bytes(large)
expect_full(lambda: store.create("manifests/2.json", large))
expect_full(lambda: store.replace("manifests/1.json", large))
expect_full(lambda: store.publish(made, "segments/s1"))
expect_full(lambda: store.publish(made, "segments/s2"))
assert (made / "a.parquet").read_bytes() == large
(made / "a.parquet").write_bytes(b"new")
store.publish(made, "segments/s1")
assert store.read("segments/s1/a.parquet") == b"new"
store.create("manifests/2.json", b"new")
print("done")
"""


def test_a_small_disk_of_its_own_runs_full(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    script = 'mount -t tmpfs -o size=1m none "$1" || exit 77; shift; exec "$@"'
    python = [sys.executable, "-c", textwrap.dedent(FILLING), str(tmp_path / "disk"), str(ROOT), str(tmp_path / "made")]
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh", str(tmp_path / "disk")]
    try:
        done = subprocess.run([*command, *python], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("unshare is missing")
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip("no file system may be mounted here")
    assert done.stdout == "done\n", done.stderr


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EEXIST, errno.EIO, errno.EBADF])
def test_other_errors_of_writing_stay_what_they_are(number: int) -> None:
    with pytest.raises(OSError, match="some error") as caught, explain_write_errors("somewhere"):
        raise OSError(number, "some error")
    assert caught.value.errno == number


# Object stores --------------------------------------------------------------------------------------------------------


def test_a_commit_whose_answer_is_lost_is_known_as_ones_own(proxy: Proxy, remote: ObjectStore) -> None:
    remote.create("manifests/1.json", b"one")
    proxy.lost = {"PUT"}
    remote.create("manifests/2.json", b"two")
    with pytest.raises((FileExistsError, StoreError)):
        remote.create("manifests/1.json", b"another")
    proxy.lost = set()
    assert remote.read("manifests/2.json") == b"two"
    assert remote.read("manifests/1.json") == b"one"
    with pytest.raises(FileExistsError):
        remote.create("manifests/2.json", b"two")


def test_marks_of_folders_are_no_files(remote: ObjectStore) -> None:
    remote.create("segments/s1/a.json", b"x")
    bucket = f"{os.environ['AWS_ENDPOINT_URL']}/{remote.url.removeprefix('s3://')}"
    for mark in ("", "/segments", "/segments/s1", "/segments/s2"):
        request(f"{bucket}{mark}/", "PUT")
    assert remote.list_files() == remote.list_files("segments/") == ["segments/s1/a.json"]


def test_many_files_are_listed(remote: ObjectStore) -> None:
    names = [f"manifests/{number:08d}.json" for number in range(1001)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: remote.replace(name, b"x"), names))
    assert remote.list_files() == names
    remote.remove(names)
    assert remote.list_files() == []


def test_scratch_belongs_to_one_place(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ObjectStore("s3://corpora/bank").scratch
    assert first.parent == cache / "memory3" / "banks"
    assert ObjectStore("s3://corpora/bank/").scratch == first
    assert ObjectStore("s3://corpora/bank2").scratch != first
    monkeypatch.setenv("AWS_ENDPOINT_URL", NOWHERE)
    assert ObjectStore("s3://corpora/bank").scratch != first
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(cache))
    assert ObjectStore("s3://corpora/bank").scratch.parent == cache / ".cache" / "memory3" / "banks"


@pytest.mark.parametrize("num_bytes", [0, 1, 99, 100, 101, 1050])
def test_a_copy_is_made_once(
    proxy: Proxy, remote: ObjectStore, monkeypatch: pytest.MonkeyPatch, num_bytes: int
) -> None:
    monkeypatch.setattr(object_store, "PART_BYTES", 100)
    content = os.urandom(num_bytes)
    remote.create("segments/s1/index.faiss", content)
    before = proxy.count("GET")
    path = remote.localize("segments/s1/index.faiss", digest(content))
    assert path.read_bytes() == content
    assert path.name == f"{digest(content)}.faiss"
    assert proxy.count("GET") - before == -(-num_bytes // 100)
    asked = len(proxy.asked)
    assert remote.localize("segments/s1/index.faiss", digest(content)) == path
    assert len(proxy.asked) == asked
    # The same content elsewhere is the same copy.
    assert remote.localize("segments/s2/index.faiss", digest(content)) == path
    assert list_all(remote.scratch) == [f"files/{path.name}"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:500] + bytes([content[500] ^ 1]) + content[501:],
        lambda content: content[:-1],
        lambda content: content + b"x",
        lambda content: b"",
    ],
)
def test_a_copy_that_was_damaged_is_made_again(
    proxy: Proxy, remote: ObjectStore, damage: Callable[[bytes], bytes]
) -> None:
    content = os.urandom(1000)
    remote.create("a.parquet", content)
    path = remote.localize("a.parquet", digest(content))
    path.write_bytes(damage(content))
    before = proxy.count("GET")
    assert remote.localize("a.parquet", digest(content)).read_bytes() == content
    assert proxy.count("GET") == before + 1
    # One that was only touched is read again, not fetched again.
    os.utime(path)
    assert remote.localize("a.parquet", digest(content)).read_bytes() == content
    assert proxy.count("GET") == before + 1


def test_an_object_with_another_content_is_not_taken(remote: ObjectStore, cache: Path) -> None:
    remote.create("segments/s1/a.parquet", b"other")
    with pytest.raises(
        BankFormatError, match=r"bank/segments/s1/a.parquet is damaged: it has not the SHA-256"
    ) as caught:
        remote.localize("segments/s1/a.parquet", digest(b"right"))
    check_sentence(caught)
    assert list_all(cache) == []
    for wrong in ("../../x", "", "A" * 64):
        with pytest.raises(BankFormatError, match="has no SHA-256"):
            remote.localize("segments/s1/a.parquet", wrong)


COPYING = """
import sys
sys.path.insert(0, sys.argv[1])
from schemas.stores import open_store
store = open_store(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
path = store.localize("a.parquet", sys.argv[3])
print(len(path.read_bytes()), flush=True)
"""


def test_processes_and_threads_make_copies_at_once(remote: ObjectStore) -> None:
    content = os.urandom(1 << 20) * 10
    remote.create("a.parquet", content)
    command = [sys.executable, "-c", COPYING, str(ROOT), remote.url, digest(content)]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) for _ in range(2)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    with ThreadPoolExecutor(3) as pool:
        paths = list(pool.map(lambda _: remote.localize("a.parquet", digest(content)), range(3)))
    for process in processes:
        assert process.communicate()[0] == f"{len(content)}\n"
        assert process.returncode == 0
    assert len(set(paths)) == 1
    assert paths[0].read_bytes() == content
    assert list_all(remote.scratch) == [f"files/{paths[0].name}"]


def test_a_folder_that_cannot_be_uploaded_stays(tmp_path: Path) -> None:
    contents = make_segment(tmp_path / "made")
    with pytest.raises(StoreError, match="s3://nobodys-bucket does not exist"):
        ObjectStore("s3://nobodys-bucket/bank").publish(tmp_path / "made", "segments/s1")
    assert list_all(tmp_path / "made") == sorted(contents)


def ask_everything(store: BankStore, folder: Path) -> list[Callable[[], object]]:
    """Everything that can be asked of a store about a file that might be there."""
    (folder / "made").mkdir(exist_ok=True)
    (folder / "made" / "a.json").write_bytes(b"x")
    return [
        store.list_files,
        lambda: store.list_files("manifests"),
        lambda: store.create("a.json", b"x"),
        lambda: store.replace("a.json", b"x"),
        lambda: store.publish(folder / "made", "segments/s1"),
        lambda: store.remove(["a.json"]),
        lambda: store.read("a.json"),
        lambda: store.read_range("a.json", 0, 1),
        lambda: store.get_size("a.json"),
        lambda: store.localize("a.json", digest(b"x")),
    ]


def test_a_bucket_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    for number, action in enumerate(ask_everything(ObjectStore("s3://nobodys-bucket/bank"), tmp_path)):
        # To the question for one file the answer may be that it is not there.
        if number == 8:
            assert action() is None
            continue
        with pytest.raises((StoreError, FileNotFoundError) if number > 8 else StoreError) as caught:
            action()
        check_sentence(caught)
        if number < 8:
            assert str(caught.value).startswith("s3://nobodys-bucket does not exist; check the name of the bucket")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://", "names no bucket that can be"),
        ("s3:///bank", "names no bucket that can be; write it as s3://BUCKET/PREFIX"),
        ("s3://two words/bank", "names no bucket"),
        ("s3://corpora/a//b", "cannot be a place for a bank; write it as s3://BUCKET/PREFIX"),
        ("s3://corpora/../b", "cannot be a place for a bank"),
        ("s3://corpora/a\nb", "cannot be a place for a bank"),
    ],
)
def test_a_url_that_cannot_be_is_one_sentence(url: str, message: str) -> None:
    with pytest.raises(StoreError, match=message) as caught:
        open_store(url)
    check_sentence(caught)


def test_refused_credentials_are_one_sentence(tmp_path: Path, remote: ObjectStore) -> None:
    remote.create("a.json", b"x")
    url = os.environ["AWS_ENDPOINT_URL"]
    request(f"{url}/moto-api/reset-auth", "POST", b"0")  # from now on the server asks who asks
    try:
        for action in ask_everything(remote, tmp_path):
            with pytest.raises(StoreError, match="with these credentials; check AWS_ACCESS_KEY_ID") as caught:
                action()
            check_sentence(caught)
    finally:
        request(f"{url}/moto-api/reset-auth", "POST", b"inf")
    assert (tmp_path / "made" / "a.json").exists()


def test_a_store_that_does_not_answer_is_one_sentence(
    tmp_path: Path, remote: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", NOWHERE)
    monkeypatch.setattr("schemas.object_urls.MAX_RETRIES", 0)  # the waits between them are seconds
    for action in ask_everything(remote, tmp_path):
        with pytest.raises(StoreError, match=r"^s3://corpora cannot be reached \(.*\); check the network") as caught:
            action()
        check_sentence(caught)


def test_missing_credentials_and_settings_are_one_sentence(
    remote: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.delenv("AWS_ACCESS_KEY_ID")
        patch.delenv("AWS_SECRET_ACCESS_KEY")
        patch.setattr("schemas.object_urls.MAX_RETRIES", 0)
        with pytest.raises(StoreError, match="no credentials were found for s3://corpora; set AWS_ACCESS_KEY_ID"):
            remote.create("a.json", b"x")
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ALLOW_HTTP", "false")
        with pytest.raises(StoreError, match="set AWS_ALLOW_HTTP=true"):
            remote.read("a.json")
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "nonsense")
        with pytest.raises(StoreError, match="AWS_ENDPOINT_URL is 'nonsense', must be a URL"):
            remote.list_files()
    for name in [name for name in os.environ if name.startswith("AZURE_")]:
        monkeypatch.delenv(name)
    with pytest.raises(StoreError, match=r"^az://container cannot be opened: .*; check AZURE_STORAGE_ACCOUNT_NAME"):
        open_store("az://container/bank")
