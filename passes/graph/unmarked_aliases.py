"""What operators share and write that their schemas do not mark.

flat, = x; _unsafe_view(x, s)      views of x, or x itself
batch_norm(x, .., mean, var, True) writes the running mean and variance

The rule: an operator that torch composes of others (`is_composite`) may hand back what it is given,
unless it is in NEW; any other returns new memory, as autograd asks of it, unless it is in VIEWS.
"""

from typing import Any

from torch import fx

from moonfx.capture.graph_nodes import is_composite
from moonfx.passes.graph.nodes import argument, operator_name


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# No composites, and still they hand back views of their operand or the operand itself.
VIEWS = _names(
    "_unsafe_view unsafe_split unsafe_split_with_sizes lift _lazy_clone _pin_memory native_dropout"
)

# Composites that always return new memory. Aliases of other operators come first, then products,
# reductions and norms, layers, and what joins or repeats.
NEW = _names(
    "absolute arccos arccosh arcsin arcsinh arctan arctan2 arctanh clip divide fix greater "
    "greater_equal less less_equal max min multiply negative not_equal square subtract true_divide "
    "where float_power isclose isfinite isreal __and__ __or__ __xor__ special_erf special_erfc "
    "special_exp2 special_expit special_expm1 special_log1p special_softmax special_log_softmax "
    "special_logsumexp log_sigmoid log_softmax softmax "
    "matmul linear inner outer ger kron tensordot linalg_matmul linalg_vecdot linalg_multi_dot "
    "linalg_norm linalg_matrix_norm frobenius_norm nuclear_norm std std_mean var var_mean nanmean "
    "cosine_similarity pairwise_distance cdist linalg_svd linalg_svdvals svd qr inverse linalg_inv "
    "linalg_eigh det linalg_det logdet argsort argwhere quantile diag "
    "scaled_dot_product_attention _scaled_dot_product_attention_math layer_norm rms_norm "
    "_fused_rms_norm group_norm batch_norm instance_norm _batch_norm_impl_index bilinear "
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d _convolution "
    "relu6 selu prelu one_hot max_pool1d max_pool2d max_pool3d avg_pool1d "
    "cross_entropy_loss nll_loss nll_loss2d nll_loss_nd l1_loss kl_div "
    "column_stack concat concatenate dstack hstack row_stack vstack tile repeat_interleave "
    "fliplr flipud cross"
)

# Composites that return new memory of several operands, and a view of one.
_NEW_OF_SEVERAL = {"einsum", "cartesian_prod", "chain_matmul", "flatten_dense_tensors"}

# Where a normalization says that it also writes what it runs on with.
_RUNNING = ("running_mean", "running_var")
_TRAINING = ("training", "train", "use_input_stats")


def shared(node: fx.Node) -> list[fx.Node]:
    """The operands that the node's result may lie in, though its schema does not say so."""
    name, operands = operator_name(node), node.all_input_nodes
    if getattr(node.target, "namespace", "") == "aten" and name in NEW:
        return []
    if name in _NEW_OF_SEVERAL and _is_given_several(node):
        return []
    return operands if name in VIEWS or is_composite(node.target) else []


def _is_given_several(node: fx.Node) -> bool:
    """Whether the node is given a list of two tensors or more, some of which may be the same."""
    lists = [a for a in node.args if isinstance(a, list | tuple)]
    return any(len([x for x in a if isinstance(x, fx.Node)]) > 1 for a in lists)


def written(node: fx.Node) -> list[fx.Node]:
    """The operands that the node writes into, though its schema marks none."""
    schema: Any = getattr(node.target, "_schema", None)
    if schema is None or schema.is_mutable:
        return []
    name = operator_name(node)
    if name.endswith("_") and not name.endswith("__"):
        return node.all_input_nodes
    if "backward" in name:
        return []
    places = {a.name: i for i, a in enumerate(schema.arguments)}
    training = next((argument(node, places[t], t) for t in _TRAINING if t in places), None)
    if training is False:
        return []
    running = [argument(node, places[r], r) for r in _RUNNING if r in places]
    return [n for n in running if isinstance(n, fx.Node)]
