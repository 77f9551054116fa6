"""InfiniRetri in plain loops: scores of tokens, sentences kept, chunks filled.

Its author saw only the paper's account, neither code nor test. Shapes: B batch, H query heads, S keys, D head width.
"""

import re

import torch


def num(x):
    """the bare number in a scalar tensor."""
    return x.detach().item() if torch.is_tensor(x) else float(x)


def token_scores(weights, question, context, window, question_weight=None):
    """weights (H,N,N) last layer softmax rows (or (1,H,N,N)); question (q0, q1), context (p, c); window w;
    question_weight (Q,1)|None -> scores (C,), the weight used (Q,1).
      W = sum over heads;  S[r,t] = sum_{j=t-(w-1-b)}^{t+b} W[r,p+j], b = (w-1)//2, zero outside the context;
      u_r = sum_{j in question} W[r,j] when no weight is given;  score_t = sum_r u_r^2 S[r,t].
    """
    if weights.dim() == 4:
        weights = weights[0]
    H = weights.shape[0]
    q0, q1 = question
    p, c = context
    C, b = c - p, (window - 1) // 2

    def W(r, j):
        return sum(weights[h, r, j] for h in range(H))

    grid = [[W(r, p + j) for j in range(C)] for r in range(q0, q1)]
    if question_weight is None:
        u = [sum(W(r, j) for j in range(q0, q1)) for r in range(q0, q1)]
    else:
        u = [question_weight[r, 0] for r in range(q1 - q0)]
    scores = []
    for t in range(C):
        score = 0
        for r in range(q1 - q0):
            S = sum(grid[r][j] for j in range(t - (window - 1 - b), t + b + 1) if 0 <= j < C)
            score = score + u[r] * u[r] * S
        scores.append(score)
    return torch.stack(scores), torch.stack(u)[:, None]


def top_tokens(scores, k):
    """positions (inside the context) of the k largest scores, ascending; all if fewer.
    # OPEN: ties to the earlier token here."""
    order = sorted(range(len(scores)), key=lambda t: (-num(scores[t]), t))[:k]
    return sorted(order)


def pick(scores, k, sentences):
    """scores (C,), sentences: list of (start, stop) in context positions, in text order -> list of (start, stop) of
    every sentence that holds one of the k best tokens, whole."""
    best = top_tokens(scores, k)
    return [(a, b) for a, b in sentences if any(a <= t < b for t in best)]


def split_sentences(text, pattern="(\n\n)|([。！？.?!])", short=10):
    """Text -> sentences: cut after the marks (the mark stays with its sentence), blanks and bare marks stay with what
    is before, a fragment of at most `short` characters after a "." stays joined (10 when chunks are filled, 8 when the
    input is indexed)."""
    marks = {"", "。", "！", "？", ".", "?", "!"}
    sentences, current = [], ""
    for piece in re.split(pattern, text):
        if not piece:
            continue
        bare = piece.strip()
        if not current.strip() or bare in marks or (current[-1] == "." and len(bare) <= short):
            current += piece
        else:
            sentences.append(current)
            current = piece
    if current.strip():
        sentences.append(current)
    return sentences


def fill_chunks(sentences, size, separator=1):
    """sentences: list of lists of ids -> list of chunks, each a list of sentences, at most `size` tokens, whole
    sentences in order. separator: tokens counted for each joint (the code counts those of a newline it never writes).
    # OPEN: a sentence longer than a chunk (code: split at blanks, then the last two pieces evened out) is here cut
    #   every `size` ids.
    """
    whole = []
    for s in sentences:
        whole += [s[a : a + size] for a in range(0, len(s), size)]
    chunks, current, total = [], [], 0
    for s in whole:
        joint = separator if current else 0
        if current and total + len(s) + joint > size:
            chunks.append(current)
            current, total, joint = [], 0, 0
        current.append(s)
        total += len(s) + joint
    if current:
        chunks.append(current)
    return chunks


def infinite_retrieval(
    sentences,
    prefix,
    rest,
    last_layer,
    generate=None,
    chunk=1024,
    topk=300,
    window=8,
    use_question_weight=True,
    question=None,
    separator=1,
):
    """The loop on ids. sentences: context as lists of ids; prefix, rest: ids of the template before and after the
    context (rest holds the question); last_layer(ids) -> weights (H,N,N); generate(ids) -> answer, or None.
    question (a, b): offsets of the question inside rest; None (default, add_prompt): from its beginning to the end.
    -> answer (None without generate), kept sentences, list of kept sentences after each chunk.
      per chunk: ids = prefix + kept + chunk + rest, positions from 0, nothing reused; u of the first chunk is frozen
      for the others (use_question_weight) or is 1 from the second on.
    # OPEN: where the question rows start: the code searches the question's first sentence in the text; with a question
    #   given and add_prompt the rows run from there to the end of the prompt: hand in `question` with b = len(rest).
    # OPEN: the code decodes the kept ids to text and tokenizes again, and splits again: sentence borders and ids can
    #   change there; on ids they cannot.
    """
    kept, u, history = [], None, []
    a, b = question or (0, len(rest))
    for part in fill_chunks(sentences, chunk, separator):
        context = kept + part
        ids = list(prefix) + [t for s in context for t in s] + list(rest)
        p = len(prefix)
        c = p + sum(len(s) for s in context)
        scores, own = token_scores(last_layer(ids), (c + a, c + b), (p, c), window, u)
        if u is None:
            u = own if use_question_weight else torch.ones_like(own)
        borders, at = [], 0
        for s in context:
            borders.append((at, at + len(s)))
            at += len(s)
        chosen = pick(scores, topk, borders)
        kept = [s for s, border in zip(context, borders) if border in chosen]
        history.append(kept)
    answer = None
    if generate is not None:
        answer = generate(list(prefix) + [t for s in kept for t in s] + list(rest))
    return answer, kept, history
