"""Who is let in, and what for."""

import hmac
from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagecoach.errors import PermissionDenied, RateLimited, Unauthenticated
from stagecoach.sampling_params import SamplingParams
from stagecoach.security.api_keys import Grant, KeyEntry, new_entry, new_key
from stagecoach_router.requests.completion import Completion
from stagecoach_router.requests.request import Request
from stagecoach_router.requests.request_state import RequestState
from stagecoach_router.sampling.outputs import Sampled
from stagecoach_router.scheduling.sequence import Sequence
from stagecoach_router.tenants import tenants as module
from stagecoach_router.tenants.caller import Caller
from stagecoach_router.tenants.tenants import Tenant, Tenants
from tests.unit.router.fake_pipelines import NoText

KEY, OTHER_KEY = new_key(), new_key()
ENTRIES = (new_entry(KEY, "ann", Grant()), new_entry(OTHER_KEY, "bob", Grant()))


def bearer(key):
    return [("user-agent", "test"), ("authorization", f"Bearer {key}")]


def test_a_key_says_whose_it_is():
    tenants = Tenants(ENTRIES, 0.0)
    assert tenants.identify(bearer(KEY)).name == "ann"
    assert tenants.identify(bearer(OTHER_KEY)).name == "bob"
    assert tenants.identify([("authorization", f"bearer  {KEY} ")]).name == "ann"
    assert tenants.identify(bearer(KEY)) is tenants.identify(bearer(KEY))


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        [],
        [("user-agent", "test")],
        bearer(""),
        bearer(new_key()),
        bearer(KEY[:-1] + ("A" if KEY[-1] != "A" else "B")),
        bearer(KEY.split("_")[1]),
        bearer(KEY + "x"),
        bearer("é" * 62),
        [("authorization", KEY)],
        [("authorization", f"Basic {KEY}")],
        bearer(KEY) + bearer(KEY),
    ],
)
def test_who_brings_no_known_key_is_nobody(metadata):
    with pytest.raises(Unauthenticated) as caught:
        Tenants(ENTRIES, 0.0).identify(metadata)
    assert not caught.value.retryable
    facts = f"{caught.value} {caught.value.value} {caught.value.limit}"
    assert all(part not in facts for part in (KEY, *KEY.split("_", 2)[1:]))


def test_without_a_file_everyone_is_let_in_and_with_an_empty_one_nobody():
    anyone = Tenants(None, 0.0).identify([])
    anyone.check_model("m")
    anyone.check_priority(2**31 - 1)
    with anyone.admit(0.0):
        anyone.charge(10**9, 0.0)
    with pytest.raises(Unauthenticated):
        Tenants((), 0.0).identify(bearer(KEY))


def test_secrets_are_compared_in_constant_time_whether_the_id_is_known_or_not(monkeypatch):
    compared = []
    real = hmac.compare_digest

    def compare(one, other):
        compared.append((len(one), len(other)))
        return real(one, other)

    monkeypatch.setattr(module.hmac, "compare_digest", compare)
    tenants = Tenants(ENTRIES, 0.0)
    tenants.identify(bearer(KEY))
    for key in (new_key(), "short"):
        with pytest.raises(Unauthenticated):
            tenants.identify(bearer(key))
    assert compared == [(64, 64)] * 3


def test_a_caller_may_use_its_models_only():
    tenant = Tenant("ann", Grant(models=("small", "large")), 0.0)
    tenant.check_model("large")
    assert not tenant.may_use("huge")
    with pytest.raises(PermissionDenied) as caught:
        tenant.check_model("huge")
    assert (caught.value.field, caught.value.retryable) == ("model", False)


def test_a_caller_may_ask_for_its_highest_priority_and_below():
    tenant = Tenant("ann", Grant(max_priority=1), 0.0)
    tenant.check_priority(1)
    tenant.check_priority(-7)
    with pytest.raises(PermissionDenied) as caught:
        tenant.check_priority(2)
    assert (caught.value.field, caught.value.limit, caught.value.value) == ("priority", "1", "2")


def test_requests_of_a_minute():
    tenant = Tenant("ann", Grant(requests_per_minute=2), 100.0)
    for _ in range(2):
        with tenant.admit(100.0):
            pass
    with pytest.raises(RateLimited) as caught, tenant.admit(100.0):
        pass
    assert caught.value.field == "requests_per_minute"
    assert caught.value.retry_after_s == pytest.approx(30, abs=0.01)
    with tenant.admit(100.0 + caught.value.retry_after_s):
        pass


def test_tokens_are_charged_as_they_come_and_shut_the_door_when_they_are_used_up():
    tenant = Tenant("ann", Grant(tokens_per_minute=60), 0.0)
    with tenant.admit(0.0):
        tenant.charge(50, 0.0)
        with tenant.admit(0.0):  # ten are left
            pass
        for _ in range(20):
            tenant.charge(1, 0.0)
        with pytest.raises(RateLimited) as caught, tenant.admit(0.0):
            pass
    assert caught.value.field == "tokens_per_minute"
    assert caught.value.retry_after_s == pytest.approx(11, abs=0.01)
    with tenant.admit(caught.value.retry_after_s):
        pass


def test_a_refused_request_costs_nothing():
    tenant = Tenant("ann", Grant(requests_per_minute=1, tokens_per_minute=60), 0.0)
    with tenant.admit(0.0):
        tenant.charge(180, 0.0)
    for _ in range(5):
        with pytest.raises(RateLimited) as caught, tenant.admit(0.0):
            pass
    assert caught.value.retry_after_s == pytest.approx(121, abs=0.01)  # the longer of both waits
    with tenant.admit(caught.value.retry_after_s):
        pass


def test_requests_at_a_time_also_when_one_fails():
    tenant = Tenant("ann", Grant(max_concurrent=2), 0.0)
    with tenant.admit(0.0):
        with pytest.raises(ZeroDivisionError), tenant.admit(0.0):
            raise ZeroDivisionError
        with tenant.admit(0.0), pytest.raises(RateLimited) as caught, tenant.admit(0.0):
            pass
    assert (caught.value.field, caught.value.retry_after_s) == ("max_concurrent", 1.0)
    assert tenant.num_running == 0


def test_each_completion_of_a_request_counts_as_one_that_runs():
    """Before, a tenant that may have one thing at a time could fill every slot with one request."""
    tenant = Tenant("ann", Grant(max_concurrent=8, requests_per_minute=5), 0.0)
    with tenant.admit(0.0, 5):
        with pytest.raises(RateLimited) as caught, tenant.admit(0.0, 4):
            pass
        assert (caught.value.field, caught.value.limit, caught.value.value) == ("max_concurrent", "8", "5")
        with tenant.admit(0.0, 3):
            assert tenant.num_running == 8
    with pytest.raises(PermissionDenied) as denied, tenant.admit(0.0, 9):
        pass
    assert (denied.value.field, denied.value.limit, denied.value.value) == ("n", "8", "9")
    assert tenant.num_running == 0


def returns(tenant, now_s):
    """How often in a row a tenant may come back for a request that is known."""
    for num in range(1000):
        try:
            tenant.admit_return(now_s)
        except RateLimited:
            return num
    return None


def test_who_comes_back_for_an_answer_may_use_up_the_next_minutes_calls_and_no_more():
    """Before, a finished request could be asked for again and again, at no cost."""
    tenant = Tenant("ann", Grant(requests_per_minute=60), 0.0)
    for _ in range(60):
        with tenant.admit(0.0):
            pass
    assert returns(tenant, 0.0) == 60, "a lost connection does not lose the answer"
    with pytest.raises(RateLimited) as caught, tenant.admit(0.0):
        pass
    assert caught.value.retry_after_s == pytest.approx(61, abs=0.01)
    with pytest.raises(RateLimited) as caught:
        tenant.admit_return(0.0)
    assert (caught.value.field, caught.value.retry_after_s) == ("requests_per_minute", pytest.approx(1, abs=0.01))
    assert returns(tenant, 3.1) == 3


def test_who_has_few_calls_a_minute_may_still_come_back_some_times():
    tenant = Tenant("ann", Grant(requests_per_minute=1), 0.0)
    with tenant.admit(0.0):
        pass
    assert returns(tenant, 0.0) == 10
    assert returns(Tenant("", Grant(), 0.0), 0.0) is None


def test_calls_that_would_be_refused_are_read_now_and_then_only():
    ann = Tenant("ann", Grant(requests_per_minute=1), 0.0)
    ann.check_reading(0.0)
    with ann.admit(0.0):
        pass
    for _ in range(module.MIN_REFUSALS_READ):
        ann.check_reading(0.0)
        with pytest.raises(RateLimited), ann.admit(0.0):
            pass
    with pytest.raises(RateLimited) as caught:
        ann.check_reading(0.0)
    later_s = caught.value.retry_after_s
    assert 0 < later_s < 2
    ann.check_reading(later_s)
    ann.admit_return(later_s)  # who comes back for an answer is heard
    ann.check_reading(1e9)


def test_refusals_do_not_keep_anybody_out_who_may_come_in_again():
    ann = Tenant("ann", Grant(requests_per_minute=600), 0.0)
    for _ in range(600):
        with ann.admit(0.0):
            pass
    for _ in range(600):
        with pytest.raises(RateLimited), ann.admit(0.0):
            pass
    ann.check_reading(0.2)
    with ann.admit(0.2):
        pass


def test_a_request_that_runs_on_counts_until_it_ends():
    tenant = Tenant("ann", Grant(max_concurrent=1), 0.0)
    with tenant.admit(0.0):
        tenant.begin()
    with pytest.raises(RateLimited), tenant.admit(0.0):
        pass
    tenant.end()
    assert tenant.num_running == 0
    with tenant.admit(0.0):
        pass


def test_what_a_former_process_let_in_counts_as_running_whatever_the_limits_say():
    tenants = Tenants((new_entry(KEY, "ann", Grant(max_concurrent=1)),), 0.0)
    ann = tenants.identify(bearer(KEY))
    for _ in range(2):
        tenants.former("ann").begin()
    assert ann.num_running == 2
    with pytest.raises(RateLimited), ann.admit(0.0):
        pass


def test_tokens_are_charged_once_each_and_those_of_a_former_process_not_again():
    ann = Tenant("ann", Grant(tokens_per_minute=60), 0.0)
    state = RequestState(Request("r", (1,) * 10, SamplingParams(max_tokens=99)), caller=Caller("ann", ann))
    state.sequences.append(Sequence(seq_id=1, prompt_tokens=(1,) * 10, params=state.request.params, seed=0))
    completion = Completion(0, (1,) * 10, state.request.params, NoText())
    state.completions.append(completion)
    state.replay(0, [Sampled(7, None, ())] * 40)
    state.charge(0.0)  # the prompt and the replayed tokens were charged by whoever let them in
    for _ in range(59):
        completion.advance(Sampled(7, None, ()))
        for _ in range(2):  # however often it is told
            state.charge(0.0)
    with ann.admit(0.0):  # one is left
        completion.advance(Sampled(7, None, ()))
        state.charge(0.0)
    with pytest.raises(RateLimited, match="tokens per minute"), ann.admit(0.0):
        pass


def test_who_is_no_caller_any_more_is_charged_for_nobody():
    tenants = Tenants(ENTRIES, 0.0)
    gone = tenants.former("gone")
    gone.begin()
    gone.charge(10, 0.0)
    assert Tenants(None, 0.0).former("ann").name == ""
    with pytest.raises(Unauthenticated):
        tenants.identify(bearer(new_key()))


grants = st.builds(
    Grant,
    requests_per_minute=st.none() | st.integers(1, 100),
    tokens_per_minute=st.none() | st.integers(1, 1000),
)


@given(grants, st.lists(st.tuples(st.floats(0, 30), st.integers(0, 300)), max_size=40))
def test_who_comes_back_when_told_to_is_let_in(grant, steps):
    tenant, now_s = Tenant("ann", grant, 0.0), 0.0
    for elapsed_s, num_tokens in steps:
        now_s += elapsed_s
        with ExitStack() as running:
            try:
                running.enter_context(tenant.admit(now_s))
            except RateLimited as error:
                now_s += error.retry_after_s
                running.enter_context(tenant.admit(now_s))
            tenant.charge(num_tokens, now_s)
    assert tenant.num_running == 0


def test_a_changed_file_keeps_what_was_used():
    tenants = Tenants((new_entry(KEY, "ann", Grant(requests_per_minute=1, max_concurrent=1)),), 0.0)
    ann = tenants.identify(bearer(KEY))
    with ann.admit(0.0):
        tenants.replace((new_entry(KEY, "ann", Grant(requests_per_minute=1, max_concurrent=2)),), 0.0)
        assert tenants.identify(bearer(KEY)) is ann
        with pytest.raises(RateLimited, match="requests per minute"), ann.admit(0.0):
            pass
        tenants.replace((new_entry(KEY, "ann", Grant()),), 0.0)
        with ann.admit(0.0):
            assert ann.num_running == 2


def test_a_new_key_of_a_name_and_the_old_one_are_one_caller_until_the_old_one_is_gone():
    old, new = ENTRIES[0], new_entry(OTHER_KEY, "ann", Grant())
    tenants = Tenants((old,), 0.0)
    ann = tenants.identify(bearer(KEY))
    tenants.replace((old, new), 0.0)
    assert tenants.identify(bearer(KEY)) is tenants.identify(bearer(OTHER_KEY)) is ann
    tenants.replace((new,), 0.0)
    assert tenants.identify(bearer(OTHER_KEY)) is ann
    with pytest.raises(Unauthenticated):
        tenants.identify(bearer(KEY))


def test_an_id_with_another_secret_is_not_enough():
    entry = ENTRIES[0]
    tenants = Tenants((KeyEntry(entry.name, entry.id, "0" * 64, Grant()),), 0.0)
    with pytest.raises(Unauthenticated):
        tenants.identify(bearer(KEY))


names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True) | st.just("")
salts = st.text(max_size=8)


@given(names, salts, names, salts)
def test_no_choice_of_one_caller_spells_anothers_salt(name, chosen, other_name, other_chosen):
    one = Tenant(name, Grant(), 0.0).cache_salt(chosen)
    other = Tenant(other_name, Grant(), 0.0).cache_salt(other_chosen)
    assert (one == other) == ((name, chosen) == (other_name, other_chosen))


def test_names_that_share_the_cache_have_one_salt_which_is_also_that_of_a_router_without_keys():
    ann, bob = (Tenant(name, Grant(shares_cache=True), 0.0) for name in ("ann", "bob"))
    anyone = Tenants(None, 0.0).identify([])
    assert ann.cache_salt("") == bob.cache_salt("") == anyone.cache_salt("") == b""
    assert ann.cache_salt("x") == bob.cache_salt("x") != b""
    assert Tenant("ann", Grant(), 0.0).cache_salt("") != b""
