"""What a service sees when an engine is lost, full, locked, or opened by another process."""

import shutil
import subprocess
import threading
import time

import pytest
import torch

from recattn.serving import StateCache, StoreError, StoreFullError, StoreUnavailableError
from tests.helpers.processes import Writer, call
from tests.helpers.state_tables import ids
from tests.helpers.stores import E, make_schema, random_state, stamped_state, stamps_of

SCHEMA = make_schema(embed_dim=E)
USERS = torch.arange(60)


@pytest.fixture
def redis_store():
    pytest.importorskip("redis")
    from recattn.serving import RedisStore

    return RedisStore


@pytest.fixture
def lmdb_store():
    pytest.importorskip("lmdb")
    from recattn.serving import LMDBStore

    return LMDBStore


def stamps(count=60, first=1):
    return stamped_state(range(first, first + count), SCHEMA)


def assert_each_call_raises(store, error, message):
    calls = [
        lambda: store.get_many(USERS),
        lambda: store.get_many(USERS, histories=True, on_invalid="missing"),
        lambda: store.put_many(USERS, stamps()),
        lambda: store.delete_many(USERS),
        lambda: store.info_many(USERS),
    ]
    for call_store in calls:
        began = time.monotonic()
        with pytest.raises(error, match=message):
            call_store()
        assert time.monotonic() - began < 5


# A Redis that is lost


def test_a_server_that_is_not_there_is_unavailable_at_once(servers, redis_store):
    store = redis_store(f"redis://127.0.0.1:{servers.free_port()}", SCHEMA)
    assert_each_call_raises(store, StoreUnavailableError, "Connection refused")
    with pytest.raises(StoreUnavailableError, match="Connection refused"):
        redis_store(f"redis://127.0.0.1:{servers.free_port()}", SCHEMA, cluster=True)


def test_a_server_that_does_not_answer_is_unavailable_within_the_time_out(servers, redis_store):
    with servers.RedisServer() as server, redis_store(server.url, SCHEMA, socket_timeout=0.2) as store:
        assert store.put_many(USERS, stamps()).all()
        server.pause()
        assert_each_call_raises(store, StoreUnavailableError, "Timeout reading from")
        server.resume()


def test_a_restarted_server_is_used_again_without_an_error(servers, redis_store):
    with servers.RedisServer() as server, redis_store(server.url, SCHEMA, socket_timeout=30) as store:
        assert store.put_many(USERS, stamps()).all()
        for use in (lambda: store.get_many(USERS), lambda: store.put_many(USERS, stamps())):
            server.kill()
            server.start()
            use()
        assert stamps_of(store.get_many(USERS, histories=True)) == list(range(1, 61))


def test_users_of_live_nodes_are_read_when_a_node_is_lost(servers, redis_store):
    with servers.RedisCluster() as cluster, redis_store(cluster.url, SCHEMA, cluster=True, socket_timeout=5) as store:
        assert store.put_many(USERS, stamps()).all()
        cache = StateCache(store, capacity=200, on_unavailable="missing", max_age=1e-6)
        cluster.kill(1)
        for call_store in (lambda: store.put_many(USERS, stamps()), lambda: store.info_many(USERS)):
            with pytest.raises(StoreUnavailableError, match="Connection refused"):
                call_store()
        with pytest.raises(StoreUnavailableError, match=r"the states of \d+ of 60 users cannot be read") as raised:
            store.get_many(USERS, histories=True)
        lost, stored = raised.value.user_ids, raised.value.stored
        assert 5 < len(lost) < 40
        served = [0 if user in lost else user + 1 for user in range(60)]
        assert stamps_of(stored) == served
        assert stored.found.tolist() == [stamp > 0 for stamp in served]
        with cache.request(USERS) as request:
            assert request.found.tolist() == [stamp > 0 for stamp in served]
        live = torch.tensor([user for user in range(60) if user not in lost])
        assert store.put_many(live, stamps(len(live), 100)).all()
        assert stamps_of(store.get_many(live)) == list(range(100, 100 + len(live)))
        cluster.start(1)
        assert store.get_many(USERS).found.all()  # and what the lost node had acknowledged
        assert stamps_of(store.get_many(lost, histories=True)) == [user + 1 for user in lost.tolist()]
        with cache.request(USERS) as request:
            assert request.found.all()


def test_a_slot_that_moved_to_another_node_is_found_there(servers, redis_store):
    with servers.RedisCluster() as cluster, redis_store(cluster.url, SCHEMA, cluster=True) as store:
        assert store.put_many(USERS, stamps()).all()
        key = b"recattn:{0}"
        slot = store._client.keyslot(key)
        [source] = [node for node in cluster.nodes if node.client().execute_command("CLUSTER COUNTKEYSINSLOT", slot)]
        target = next(node for node in cluster.nodes if node is not source)
        with source.client() as old, target.client() as new:
            old_id, new_id = (client.execute_command("CLUSTER MYID").decode() for client in (old, new))
            new.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", old_id)
            old.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", new_id)
            keys = old.execute_command("CLUSTER GETKEYSINSLOT", slot, 10)
            for key in keys:  # one key after the other, and in between a user is on two nodes
                assert stamps_of(store.get_many(USERS)) == list(range(1, 61))
                old.execute_command("MIGRATE", servers.HOST, target.port, key, 0, 5000)
            assert stamps_of(store.get_many(USERS, histories=True)) == list(range(1, 61))  # ASK
            assert store.put_many(USERS, stamps(first=2)).all()
            for client in (new, old):
                client.execute_command("CLUSTER SETSLOT", slot, "NODE", new_id)
            assert stamps_of(store.get_many(USERS, histories=True)) == list(range(2, 62))  # MOVED
            assert store.put_many(USERS, stamps(first=3)).all()
            assert stamps_of(store.get_many(USERS, histories=True)) == list(range(3, 63))


# A disk that is full


@pytest.fixture
def small_disk(tmp_path):
    """A folder of 2 MB, and a function that makes it larger."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder, lambda: subprocess.run(["mount", "-o", "remount,size=32m", folder], check=True)
    subprocess.run(["umount", folder], check=True)


def put_until_it_fails(store, error):
    """How many users, one after the other, were acknowledged."""
    for user in range(10_000):
        try:
            store.put_many(ids(user), stamped_state([user + 1], store.schema))
        except error:
            return user
    raise AssertionError("it has room for all")


def test_redis_on_a_full_disk_ends_and_has_all_that_it_acknowledged_when_there_is_room(
    servers, redis_store, small_disk
):
    folder, make_room = small_disk
    schema = make_schema(rank=32)
    with servers.RedisServer(dir=folder) as server, redis_store(server.url, schema, socket_timeout=30) as store:
        written = put_until_it_fails(store, StoreUnavailableError)
        assert server.process.wait(timeout=10) == 1
        make_room()
        server.start()
        assert stamps_of(store.get_many(torch.arange(written))) == list(range(1, written + 1))
        assert store.put_many(ids(written), stamped_state([written + 1], schema)).all()


def test_lmdb_on_a_full_disk_reads_and_goes_on_when_there_is_room(lmdb_store, small_disk):
    folder, make_room = small_disk
    schema = make_schema(rank=32)
    with lmdb_store(folder, schema) as store:
        written = put_until_it_fails(store, StoreFullError)
        assert stamps_of(store.get_many(torch.arange(written + 1))) == [*range(1, written + 1), 0]
        make_room()
        assert store.put_many(ids(written), stamped_state([written + 1], schema)).all()
        assert stamps_of(store.get_many(torch.arange(written + 1))) == [*range(1, written + 2)]


# How Redis is connected to


def test_namespaces_and_passwords_keep_users_apart(servers, redis_store):
    with servers.RedisServer(requirepass="secret") as server:
        with redis_store(server.url, SCHEMA, namespace="one") as one, redis_store(server.url, SCHEMA) as other:
            one.put_many(ids(1), stamps(1))
            assert not other.get_many(ids(1)).found.any()
            assert other.delete_many(ids(1)) == 0
            assert one.get_many(ids(1)).found.all()
        with redis_store(server.url.replace("secret", "wrong"), SCHEMA) as store:
            assert_each_call_raises(store, StoreUnavailableError, "invalid username-password pair")
        with redis_store(server.url.replace(":secret@", ""), SCHEMA) as store:
            assert_each_call_raises(store, StoreError, "(?i)authenticat")  # redis-py 8 says HELLO, older ones GET


def test_tls_is_passed_through(servers, redis_store, tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not on the PATH")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    command += ["-subj", "/CN=recattn", "-addext", f"subjectAltName=IP:{servers.HOST}"]
    command += ["-keyout", key, "-out", certificate]
    subprocess.run(command, check=True, capture_output=True)
    options = {"tls_cert_file": certificate, "tls_key_file": key, "tls_auth_clients": "no"}
    with servers.RedisServer(**options) as server:
        with redis_store(server.url, SCHEMA, ssl_ca_certs=str(certificate)) as store:
            store.put_many(USERS, stamps())
            assert stamps_of(store.get_many(USERS)) == list(range(1, 61))
        with redis_store(server.url, SCHEMA) as store:
            assert_each_call_raises(store, StoreUnavailableError, "certificate verify failed")


def test_options_that_would_change_bytes_are_refused(redis_store):
    with pytest.raises(ValueError, match="decode_responses must be False"):
        redis_store("redis://127.0.0.1:1", SCHEMA, decode_responses=True)
    with pytest.raises(ValueError, match="namespace must be a string without braces"):
        redis_store("redis://127.0.0.1:1", SCHEMA, namespace="{all}")


# LMDB


def test_a_store_that_reached_max_bytes_still_reads_and_deletes(lmdb_store, tmp_path):
    schema = make_schema(rank=32)
    with lmdb_store(tmp_path, schema, max_bytes=1 << 20) as store:
        written = 0
        with pytest.raises(StoreFullError, match="has reached its max_bytes: reopen it with more"):
            for user in range(10_000):
                store.put_many(ids(user), stamped_state([user + 1], schema))
                written += 1
        assert written > 50
        assert stamps_of(store.get_many(torch.arange(written + 1))) == [*range(1, written + 1), 0]
        assert store.delete_many(torch.arange(20)) == 20
        assert store.delete_many(torch.arange(20, 30)) == 10  # LMDB uses pages again two transactions later
        assert store.put_many(torch.arange(10), random_state(10, schema)).all()
    with lmdb_store(tmp_path, schema, max_bytes=1 << 22) as store:
        assert store.put_many(torch.arange(100), random_state(100, schema)).all()


def hold_the_write_lock(acknowledge, store):
    with store._env.begin(write=True):
        acknowledge(0)
        time.sleep(5)


def test_threads_run_while_a_store_waits_to_be_opened_for_another_process_that_writes(lmdb_store, tmp_path):
    with lmdb_store(tmp_path, SCHEMA) as store, Writer(hold_the_write_lock, store) as writer:
        writer.wait()
        store.close()
        opening = threading.Thread(target=lambda: lmdb_store(tmp_path, SCHEMA).close())
        began = time.monotonic()
        opening.start()
        opening.join(0.1)
        assert opening.is_alive() and time.monotonic() - began < 4
    opening.join(20)
    assert not opening.is_alive()


def test_a_readonly_store_reads_and_refuses_writes(lmdb_store, tmp_path):
    with pytest.raises(StoreError, match="No such file or directory"):
        lmdb_store(tmp_path / "nothing", SCHEMA, readonly=True)
    with lmdb_store(tmp_path, SCHEMA) as store:
        store.put_many(USERS, stamps())
    with lmdb_store(tmp_path, SCHEMA, readonly=True) as store:
        assert stamps_of(store.get_many(USERS, histories=True)) == list(range(1, 61))
        for write in (
            lambda: store.put_many(USERS, stamps()),
            lambda: store.delete_many(USERS),
            store.delete_expired,
        ):
            with pytest.raises(StoreError, match=r"Permission denied|read-only"):
                write()


# Another process


def add_one(store):
    stored = store.get_many(USERS, histories=True)
    return stamps_of(stored), store.put_many(USERS, stamps(first=2), replaces=stored.info).all().item()


@pytest.mark.parametrize("engine", ["lmdb", "redis", "cluster"], indirect=True)
def test_a_store_sent_to_another_process_is_opened_there(engine):
    store = engine.open(SCHEMA)
    store.put_many(USERS, stamps())
    assert call(add_one, store) == (list(range(1, 61)), True)
    assert stamps_of(store.get_many(USERS, histories=True)) == list(range(2, 62))
