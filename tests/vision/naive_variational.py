"""Variational attention and its losses in loops; their author saw only an account of the paper, neither code nor
test."""

import torch


def sigmoid(z):
    return 1 / (1 + torch.exp(-z))


def posterior(x, w1, mean_weight, log_var_weight, *, b1=None, mean_bias=None, log_var_bias=None, clamp=(-10.0, 10.0)):
    """Equation 1: s = GAP(x), h = relu(W1 s), mu = Wm h, log sigma^2 = Wv h. x (B,C,Y,X), w1 (C/r, C), mean_weight,
    log_var_weight (C, C/r) -> mu, log_variance, each (B,C)."""
    mu, lv = [], []
    for b in range(x.shape[0]):
        s = torch.stack([x[b, c].mean() for c in range(x.shape[1])])
        h = w1 @ s if b1 is None else w1 @ s + b1
        h = torch.relu(h)
        m = mean_weight @ h if mean_bias is None else mean_weight @ h + mean_bias
        v = log_var_weight @ h if log_var_bias is None else log_var_weight @ h + log_var_bias
        mu.append(m)
        lv.append(v if clamp is None else torch.clamp(v, *clamp))
    return torch.stack(mu), torch.stack(lv)


def sample(mean, log_variance, eps=None):
    """Equation 2: z = mu + sigma . eps in training (eps (B,C), once for each image and channel), z = mu in eval
    (None)."""
    return mean if eps is None else mean + torch.exp(0.5 * log_variance) * eps


def attend(x, z):
    """Equation 3: y = sigmoid(z) . x, one number for each image and channel."""
    return torch.stack(
        [torch.stack([sigmoid(z[b, c]) * x[b, c] for c in range(x.shape[1])]) for b in range(x.shape[0])]
    )


def variational_attention(x, w1, mean_weight, log_var_weight, *, eps=None, **options):
    """Equations 1 to 3: (B,C,Y,X) -> (B,C,Y,X). eps (B,C) standard normal in training, None in eval."""
    return attend(x, sample(*posterior(x, w1, mean_weight, log_var_weight, **options), eps))


def gaussian_kl(mean, log_variance, prior_mean):
    """KL(N(mu, sigma^2) || N(m, I)) of one sample, all (C,): 1/2 sum_c (sigma_c^2 + (mu_c - m_c)^2 - 1 - log
    sigma_c^2)."""
    total = 0
    for c in range(mean.shape[0]):
        total = total + torch.exp(log_variance[c]) + (mean[c] - prior_mean[c]) ** 2 - 1 - log_variance[c]
    return total / 2


def domain_kl(mean, log_variance, domain, prior_means):
    """Equation 4: sum over channels, mean over the batch. mean, log_variance (B,C), domain (B,) int, prior_means
    (num_domains, C) with unit variance (DomainPrior)."""
    B = mean.shape[0]
    return sum(gaussian_kl(mean[b], log_variance[b], prior_means[int(domain[b])]) for b in range(B)) / B


def fixed_prior_means_signed(num_domains, dim, distance=2.0):
    """The claim's reading: domains 2i and 2i + 1 at +distance and -distance on axis i."""
    means = torch.zeros(num_domains, dim, dtype=torch.float64)
    for d in range(num_domains):
        means[d, (d // 2) % dim] = distance if d % 2 == 0 else -distance
    return means


def mixture_kl(mean, log_variance, domain, prior_means, log_weights, *, hard=False, responsibilities=None):
    """Equation 5, soft form (I), MixturePrior: upper bound sum_k r_k KL(q || N_k) + KL(r || pi), mean over the
    batch.

    prior_means (num_domains, K, C), log_weights (num_domains, K) with pi = softmax(log_weights). responsibilities
    (B,K):
    used as they are; otherwise the best ones, r_k ~ pi_k exp(-KL_k) (the bound is then -log sum_k pi_k exp(-KL_k));
    hard:
    r is one at the smallest KL_k - log pi_k, the bound is that smallest value."""
    B = mean.shape[0]
    total = 0
    for b in range(B):
        d = int(domain[b])
        K = prior_means.shape[1]
        log_pi = log_weights[d] - torch.logsumexp(log_weights[d], dim=0)
        kl = torch.stack([gaussian_kl(mean[b], log_variance[b], prior_means[d, k]) for k in range(K)])
        if responsibilities is not None:
            r = responsibilities[b]
        elif hard:
            r = torch.zeros(K, dtype=kl.dtype)
            r[int(torch.argmin((kl - log_pi).detach()))] = 1.0
        else:
            r = torch.exp(log_pi - kl - torch.logsumexp(log_pi - kl, dim=0))
        for k in range(K):
            total = total + r[k] * kl[k]
            if float(r[k].detach()) > 0:
                total = total + r[k] * (torch.log(r[k]) - log_pi[k])
    return total / B


def nearest_clusters(points, centres):
    """(n, C), (k, C) -> (n,) index of the nearest centre."""
    return torch.tensor([min(range(len(centres)), key=lambda k: float(((p - centres[k]) ** 2).sum())) for p in points])


def k_means(points, centres, iterations=100):
    """Lloyd's iterations from given centres -> labels (n,), centres (k, C); an empty cluster keeps its centre."""
    labels = nearest_clusters(points, centres)
    for _ in range(iterations):
        centres = torch.stack(
            [points[labels == k].mean(dim=0) if bool((labels == k).any()) else centres[k] for k in range(len(centres))]
        )
        new = nearest_clusters(points, centres)
        if bool((new == labels).all()):
            break
        labels = new
    return labels, centres


def intrinsic_domains(means, domain, centres):
    """Equation 5 (R): clusters of the attention MEANS inside each domain; new label = number of (domain, cluster)
    in
    order, domains ascending. means (n, C), domain (n,), centres: for each domain a (k_d, C) start -> labels
    (n,)."""
    labels = torch.zeros(len(means), dtype=torch.long)
    offset = 0
    for d, start in enumerate(centres):
        index = (domain == d).nonzero().reshape(-1)
        labels[index] = k_means(means[index], start)[0] + offset
        offset += len(start)
    return labels


def is_k_means_fixpoint(points, labels, k):
    """True when every point is nearest to the mean of its own cluster."""
    centres = torch.stack([points[labels == c].mean(dim=0) for c in range(k)])
    return bool((nearest_clusters(points, centres) == labels).all())
