"""Linear attention: time and memory linear in length."""

from regard.linear.agent import AgentAttention, agent_attention
from regard.linear.agent_grid import GridAgentAttention
from regard.linear.conserved_flow import causal_flow_attention, flow_attention
from regard.linear.efficient import EfficientAttention, efficient_attention
from regard.linear.fast import FastAttention, fast_attention
from regard.linear.flow import FlowAttention
from regard.linear.latte import Latte, causal_latte_attention, latte_attention
from regard.linear.lightning import LightningAttention, lightning_attention
from regard.linear.linear import LinearAttention, linear_attention
from regard.linear.nystrom import NystromAttention, nystrom_attention
from regard.linear.performer import Performer, performer_attention, random_directions

__all__ = [
    "AgentAttention",
    "EfficientAttention",
    "FastAttention",
    "FlowAttention",
    "GridAgentAttention",
    "Latte",
    "LightningAttention",
    "LinearAttention",
    "NystromAttention",
    "Performer",
    "agent_attention",
    "causal_flow_attention",
    "causal_latte_attention",
    "efficient_attention",
    "fast_attention",
    "flow_attention",
    "latte_attention",
    "lightning_attention",
    "linear_attention",
    "nystrom_attention",
    "performer_attention",
    "random_directions",
]
