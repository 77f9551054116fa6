"""Attention weights as marginals of a hidden edge variable, by enumeration (B039).

Its author saw a description of the equations only, neither our code nor its tests.

Equations: 1 (posterior over phi), 2 (expected value), 3 (marginals = d log Z / d theta), 4
(members), 5 (geometric prior of the successor), masks.

How it is written: for every member the list of ALL admissible configurations phi of one row (or of
one whole matrix for the tree) with the log weight of each; log Z is the log of the summed weights,
a marginal is the summed probability of the configurations that contain the edge.  The closed forms
of the description stand beside it.  Everything is differentiable in theta (and in the prior's numbers).

Ambiguous in the description, and the reading taken here:
- prior p(phi): `log_prior` adds to theta edge by edge.  For OneEdge that is log p(s); for
  Independent it is the log of the prior ODDS; for AtMostOne and ExactlyK an edge weight relative to
  "no partner" / to the other edges.  A uniform prior is left out, so log_partition carries no
  1/S (marginals are the same).
- mask `keep` (…,T,S): a masked edge is in no configuration.  No configuration at all (OneEdge with
  an empty row; ExactlyK with fewer than k visible keys): log Z = -inf and marginals 0.  The description
  says so only for OneEdge's empty rows.
- Chain: binary states phi_s along s; log weight = sum_s theta_s phi_s + sum_{s>=1}
  transition[phi_{s-1}][phi_s] (+ initial[phi_0]); transition holds LOG potentials (description:
  "transition potentials"), not probabilities.  A masked position stays in the chain with state 0.
  Categorical form: theta (S,C), transition (C,C), marginals (S,C).
- Tree: theta_ts = "the head of t is s" (as theta's index order in the description), so the row sums of W
  stand on the diagonal; the description's "column sums" is the transposed order (head, modifier).  The
  diagonal theta_tt is not used; root scores are an argument (`root`, default 0).  Several tokens
  may hang on the root (that is what diag(sums + root) - W counts); `single_root=True` is the other
  reading.  Marginals of the root edges are returned apart.
- geometric prior: p(s) proportional to (1-r)^(t-s) for s <= t; hyper-prior not built.
- members such as slot attention and mixtures: only the posterior over the QUERY axis and one
  weighted mean (recalled in the description).

theta: (..., T, S).
"""

import itertools
import math

import torch


def _log_sum_exp(terms, like):
    if not terms:
        return like.new_full((), -math.inf)
    top = max(float(t.detach()) for t in terms)
    if top == -math.inf:
        return like.new_full((), -math.inf)
    return top + torch.log(sum(torch.exp(t - top) for t in terms))


def _seen(keep, S):
    return [True] * S if keep is None else [bool(x) for x in keep]


# --- configurations of one row: lists of (phi, log weight) -------------------------------------


def one_edge(row, keep=None):
    S = row.shape[0]
    return [(tuple(int(n == s) for n in range(S)), row[s]) for s in range(S) if _seen(keep, S)[s]]


def at_most_one(row, keep=None):
    return [((0,) * row.shape[0], row.new_zeros(()))] + one_edge(row, keep)


def independent(row, keep=None):
    S, seen = row.shape[0], _seen(keep, row.shape[0])
    out = []
    for phi in itertools.product((0, 1), repeat=S):
        if all(seen[s] or not phi[s] for s in range(S)):
            out.append((phi, sum([row[s] for s in range(S) if phi[s]], row.new_zeros(()))))
    return out


def exactly_k(row, k, keep=None):
    return [(phi, w) for phi, w in independent(row, keep) if sum(phi) == k]


def chain(row, transition, keep=None, initial=None):
    S = row.shape[0]
    out = []
    for phi, w in independent(row, keep):
        for s in range(1, S):
            w = w + transition[phi[s - 1], phi[s]]
        out.append((phi, w if initial is None else w + initial[phi[0]]))
    return out


def configurations(row, prior, keep=None):
    """prior: ("one_edge",), ("at_most_one",), ("independent",), ("exactly_k", k),
    ("chain", transition) or ("chain", transition, initial)."""
    name, rest = prior[0], prior[1:]
    if name == "one_edge":
        return one_edge(row, keep)
    if name == "at_most_one":
        return at_most_one(row, keep)
    if name == "independent":
        return independent(row, keep)
    if name == "exactly_k":
        return exactly_k(row, rest[0], keep)
    if name == "chain":
        return chain(row, rest[0], keep, rest[1] if len(rest) > 1 else None)
    raise ValueError(name)


def row_log_partition(row, prior, keep=None):
    return _log_sum_exp([w for _, w in configurations(row, prior, keep)], row)


def row_marginals(row, prior, keep=None):
    found = configurations(row, prior, keep)
    S = row.shape[0]
    if not found:
        return torch.stack([row.new_zeros(())] * S)
    log_z = _log_sum_exp([w for _, w in found], row)
    return torch.stack([sum([torch.exp(w - log_z) for phi, w in found if phi[s]], row.new_zeros(())) for s in range(S)])


def row_expected_value(row, prior, value, keep=None):
    """eq. 2 for any value(phi): the expectation of the value, not the value of the expectation."""
    found = configurations(row, prior, keep)
    log_z = _log_sum_exp([w for _, w in found], row)
    return sum(torch.exp(w - log_z) * value(phi) for phi, w in found)


def row_mode(row, prior, keep=None):
    """hard attention: the configuration of largest weight (the first one of equal ones)."""
    found = configurations(row, prior, keep)
    return max(found, key=lambda c: float(c[1].detach()))[0] if found else (0,) * row.shape[0]


# --- over leading dimensions --------------------------------------------------------------------


def _rows(theta, keep, log_prior, make):
    if theta.dim() == 1:
        row = theta if log_prior is None else theta + log_prior
        return make(row, keep)
    size = theta.shape[0]

    def part(t, n):
        """Leading axes of length 1 or missing axes are shared."""
        if t is None or t.dim() < theta.dim():
            return t
        return t[n if t.shape[0] > 1 else 0]

    keep = None if keep is None else torch.as_tensor(keep)
    return torch.stack([_rows(theta[n], part(keep, n), part(log_prior, n), make) for n in range(size)])


def edge_marginals(theta, prior, keep=None, log_prior=None):
    """(..., T, S) -> (..., T, S), by enumeration."""
    return _rows(theta, keep, log_prior, lambda row, kept: row_marginals(row, prior, kept))


def log_partition(theta, prior, keep=None, log_prior=None):
    """(..., T, S) -> (..., T)."""
    return _rows(theta, keep, log_prior, lambda row, kept: row_log_partition(row, prior, kept))


def expected_value(theta, prior, v, keep=None, log_prior=None):
    """value linear in phi: sum_s m_ts v_s; theta (..., T, S), v (..., S, V)."""
    m = edge_marginals(theta, prior, keep, log_prior)

    def apply(weights, values):
        if weights.dim() == 2:
            return torch.stack(
                [sum(weights[t, s] * values[s] for s in range(weights.shape[1])) for t in range(weights.shape[0])]
            )
        return torch.stack([apply(weights[n], values[n]) for n in range(weights.shape[0])])

    return apply(m, v)


# --- closed forms of the description (one row; keep as booleans) ----------------------------------------


def closed_one_edge(row, keep=None):
    seen = _seen(keep, row.shape[0])
    total = sum([torch.exp(row[s]) for s in range(row.shape[0]) if seen[s]], row.new_zeros(()))
    return torch.stack([torch.exp(row[s]) / total if seen[s] else row.new_zeros(()) for s in range(row.shape[0])])


def closed_at_most_one(row, keep=None):
    seen = _seen(keep, row.shape[0])
    total = 1 + sum([torch.exp(row[s]) for s in range(row.shape[0]) if seen[s]], row.new_zeros(()))
    return torch.stack([torch.exp(row[s]) / total if seen[s] else row.new_zeros(()) for s in range(row.shape[0])])


def closed_independent(row, keep=None):
    seen = _seen(keep, row.shape[0])
    return torch.stack([torch.sigmoid(row[s]) if seen[s] else row.new_zeros(()) for s in range(row.shape[0])])


def elementary_symmetric(weights, k):
    """e_0 .. e_k by the recursion e_j <- e_j + w e_{j-1}."""
    e = [1.0] + [0.0] * k
    for w in weights:
        e = [e[0]] + [e[j] + w * e[j - 1] for j in range(1, k + 1)]
    return e


def closed_exactly_k(row, k, keep=None):
    """m_s = w_s e_{k-1}(the others) / e_k(all)."""
    S, seen = row.shape[0], _seen(keep, row.shape[0])
    live = [s for s in range(S) if seen[s]]
    if len(live) < k:
        return torch.stack([row.new_zeros(())] * S)
    w = {s: torch.exp(row[s]) for s in live}
    total = elementary_symmetric([w[s] for s in live], k)[k]
    return torch.stack(
        [
            w[s] * elementary_symmetric([w[r] for r in live if r != s], k - 1)[k - 1] / total
            if seen[s]
            else row.new_zeros(())
            for s in range(S)
        ]
    )


def closed_chain(row, transition, keep=None, initial=None):
    """forward-backward over binary states."""
    S, seen = row.shape[0], _seen(keep, row.shape[0])
    local = [[0.0, row[s]] if seen[s] else [0.0, None] for s in range(S)]
    states = [[0, 1] if seen[s] else [0] for s in range(S)]

    def weight(s, z):
        return local[s][z] if z else row.new_zeros(())

    ahead = [{z: weight(0, z) + (0.0 if initial is None else initial[z]) for z in states[0]}]
    for s in range(1, S):
        ahead.append(
            {
                z: weight(s, z) + _log_sum_exp([ahead[s - 1][y] + transition[y, z] for y in states[s - 1]], row)
                for z in states[s]
            }
        )
    behind = [None] * (S - 1) + [{z: row.new_zeros(()) for z in states[S - 1]}]
    for s in range(S - 2, -1, -1):
        behind[s] = {
            z: _log_sum_exp([transition[z, y] + weight(s + 1, y) + behind[s + 1][y] for y in states[s + 1]], row)
            for z in states[s]
        }
    log_z = _log_sum_exp(list(ahead[S - 1].values()), row)
    return torch.stack(
        [torch.exp(ahead[s][1] + behind[s][1] - log_z) if seen[s] else row.new_zeros(()) for s in range(S)]
    ), log_z


def chain_categorical(theta, transition, initial=None):
    """theta (S,C): marginals (S,C) and log Z over all C^S state sequences."""
    S, C = theta.shape
    found = []
    for z in itertools.product(range(C), repeat=S):
        w = sum(theta[s, z[s]] for s in range(S))
        w = w + sum([transition[z[s - 1], z[s]] for s in range(1, S)], theta.new_zeros(()))
        found.append((z, w if initial is None else w + initial[z[0]]))
    log_z = _log_sum_exp([w for _, w in found], theta)
    m = torch.stack(
        [
            torch.stack(
                [sum([torch.exp(w - log_z) for z, w in found if z[s] == c], theta.new_zeros(())) for c in range(C)]
            )
            for s in range(S)
        ]
    )
    return m, log_z


# --- trees --------------------------------------------------------------------------------------


def _is_tree(heads):
    """heads[t] in 0..N-1 or -1 (root): every token reaches the root."""
    for t in range(len(heads)):
        node, steps = t, 0
        while node != -1 and steps <= len(heads):
            node, steps = heads[node], steps + 1
        if node != -1:
            return False
    return True


def trees(theta, root=None, keep=None, single_root=False):
    """All trees on N tokens with log weights; theta (N,N), theta[t,s]: the head of t is s."""
    N = theta.shape[0]
    root = theta.new_zeros(N) if root is None else root
    out = []
    for heads in itertools.product(range(-1, N), repeat=N):
        if any(heads[t] == t for t in range(N)) or not _is_tree(heads):
            continue
        if keep is not None and any(h >= 0 and not bool(torch.as_tensor(keep)[t, h]) for t, h in enumerate(heads)):
            continue
        if single_root and sum(h == -1 for h in heads) != 1:
            continue
        out.append((heads, sum(root[t] if h == -1 else theta[t, h] for t, h in enumerate(heads))))
    return out


def tree_marginals(theta, root=None, keep=None, single_root=False):
    """(marginals (N,N), root marginals (N), log Z)."""
    N = theta.shape[0]
    found = trees(theta, root, keep, single_root)
    log_z = _log_sum_exp([w for _, w in found], theta)
    zero = theta.new_zeros(())
    m = torch.stack(
        [
            torch.stack([sum([torch.exp(w - log_z) for heads, w in found if heads[t] == s], zero) for s in range(N)])
            for t in range(N)
        ]
    )
    r = torch.stack([sum([torch.exp(w - log_z) for heads, w in found if heads[t] == -1], zero) for t in range(N)])
    return m, r, log_z


def tree_log_partition_matrix(theta, root=None, keep=None):
    """log det L, L = diag(sum_s W_ts + e^root_t) - W (several roots allowed)."""
    N = theta.shape[0]
    root = theta.new_zeros(N) if root is None else root
    W = [
        [
            torch.exp(theta[t, s])
            if s != t and (keep is None or bool(torch.as_tensor(keep)[t, s]))
            else theta.new_zeros(())
            for s in range(N)
        ]
        for t in range(N)
    ]
    L = torch.stack(
        [torch.stack([sum(W[t]) + torch.exp(root[t]) if s == t else -W[t][s] for s in range(N)]) for t in range(N)]
    )
    return torch.logdet(L)


# --- priors and relatives -------------------------------------------------------------------------


def geometric_log_prior(T, r, S=None, normalised=False):
    """log p(s) = (t-s) log(1-r), s <= t (others -inf: use keep); r a tensor in (0,1)."""
    S = T if S is None else S
    r = torch.as_tensor(r, dtype=torch.float64)
    rows = []
    for t in range(T):
        at = t + S - T
        cells = [torch.log(1 - r) * (at - s) for s in range(at + 1)]
        if normalised:
            total = _log_sum_exp(cells, r)
            cells = [c - total for c in cells]
        rows.append(torch.stack(cells + [r.new_full((), -math.inf)] * (S - at - 1)))
    return torch.stack(rows)


def slot_responsibilities(theta):
    """posterior over the query axis, per key: theta (T,S) -> (T,S) with columns summing to 1."""
    T, S = theta.shape
    columns = [closed_one_edge(torch.stack([theta[t, s] for t in range(T)])) for s in range(S)]
    return torch.stack([torch.stack([columns[s][t] for s in range(S)]) for t in range(T)])


def slot_update(theta, v):
    """one M step: the weighted mean of the values of each slot."""
    r = slot_responsibilities(theta)
    T, S = r.shape
    return torch.stack([sum(r[t, s] * v[s] for s in range(S)) / sum(r[t, s] for s in range(S)) for t in range(T)])
