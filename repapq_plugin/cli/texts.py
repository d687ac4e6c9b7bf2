"""Help texts of the commands."""

CLI_HELP = """\
Post-training quantization of reparameterized networks (RepAPQ) for OpenMMLab configs.

\b
  repapq quantize CONFIG [CHECKPOINT]   float in, INT8 files and a comparison out
  repapq eval     [CONFIG] RESULT       score a result, simulated or on a runtime
  repapq export   [CONFIG] RESULT       write a result as ONNX or OpenVINO
  repapq compare  CONFIG [CHECKPOINT]   methods side by side in one table
  repapq sensitivity CONFIG [CHECKPOINT]  bits of each unit for a budget
  repapq diagnose CONFIG [CHECKPOINT]   why a model loses, and what helps
  repapq targets  [NAME]                what runtimes can compute, with sources
  repapq check    FILE --target NAME    whether an ONNX file keeps a target's rules
  repapq doctor                         what is installed and works together

CONFIG is any mmdet, mmyolo, mmpretrain or mmseg config of a model with a training set and a test set. Scores are
always the toolbox's own metric on the config's test set.

Exit codes: 0 done, 1 wrong input or no room (said in a few lines), 2 command not understood, 130 interrupted (nothing
is left half written).
"""

QUANTIZE_HELP = """\
Quantize the model of CONFIG and compare it with the float one.

Loads CHECKPOINT (default: the config's load_from), merges the branches, calibrates, and writes to the work folder:

\b
  repapq.safetensors    the quantized network, for `repapq eval` and
                        `repapq export`
  repapq.onnx           QDQ ONNX: int8 weights, one Quantize/Dequantize
                        pair per quantized tensor
  repapq.xml, .bin      the same network for OpenVINO
  float.xml, .bin       the float network, merged, to compare with
  report.html           all of it as a page: scores, predictions, losses,
                        activations and their outliers (--no-report)
  result.json           everything in the table, and more (below)
  repapq.log, toolbox/  what the toolbox printed and logged
  checkpoint/           each finished part of the calibration, until all
                        is done; --resume goes on with them

Another host quantizes with -q type=NNCF, -q type=TorchAO or -q type=PT2E, or where the config says so. NNCF saves
nncf.pth in place of repapq.safetensors, and writes no ONNX.

CHECKPOINT is read as plain data: nothing in it is run. One that holds more than mmengine writes is refused, and what it
holds is named; --trust-checkpoint reads it all the same.

\b
result.json holds:
  config, checkpoint    their paths
  scheme, settings      bits and ranges; all quantizer keys, seed,
                        calibration source and number of samples
  scores                all metrics of the toolbox, for float, plain_ptq,
                        repapq (simulated, or as another host runs it)
                        and openvino
  size_bytes            of float, onnx and openvino
  latency               milliseconds for a batch of one on OpenVINO,
                        float and INT8 measured in turn
  kernels               kernel of each layer in OpenVINO's executed
                        graph; integer ones end in I8
  exports               operators, Quantize/Dequantize pairs, integer
                        layers, largest difference from torch
  calibration           per unit: stage, loss before and after, kept or
                        not, seconds; merged blocks and their largest
                        error; bits per layer; float layers and why
  files, seconds, versions, machine
"""

EVAL_HELP = """\
Score RESULT with the toolbox's own metric on the test set of CONFIG.

Without CONFIG the file says it: RESULT knows its config and the overrides it was read with, and how it was quantized,
which is shown. Files of older versions and of others need CONFIG.

RESULT is a repapq.safetensors, NNCF's nncf.pth, or an exported .onnx or .xml. A runtime takes the network part of the
model; preprocessing, decoding and the metric stay the toolbox's. What is not exported yet goes to a temporary folder
first when it is scored on a runtime.
"""

EXPORT_HELP = """\
Write RESULT (a repapq.safetensors) as QDQ ONNX, as OpenVINO IR or for phones, or NNCF's nncf.pth as OpenVINO IR.
Without CONFIG, RESULT says which config it was made from.

The file holds the network part of the model of CONFIG: preprocessed images in, raw outputs of the head out. Its image
size is that of the config's calibration images. The batch size stays open, but for phones it is 1.
"""

OUT_HELP = (
    "File to write: .onnx, .xml, .pte (executorch), .tflite (litert) or .pt2 (program, for `repapq lower`). "
    "[default: repapq.onnx and the like beside RESULT; with decoding repapq-detector.onnx or .xml]"
)

LOWER_HELP = """\
Write PROGRAM (a .pt2 of `repapq export --format program`) for phones: OUT.pte for ExecuTorch, OUT.tflite for LiteRT.

This needs executorch or litert-torch, and neither a toolbox nor the network's code, so that it also works where these
packages do not go together with the toolboxes.
"""

COMPARE_HELP = """\
Compare methods on CONFIG's model: one scheme, one calibration set, one metric, one table.

Each method is calibrated in a process of its own, whose memory and processor time are measured. It is scored as it is
simulated and, exported, on an integer runtime. Bits and the number of steps are those of the config, --preset and -q;
ranges and learning are the method's. A method that fails loses none of the others: its row says why.

\b
Methods (--method, default: all of these):
  min-max, percentile,  ranges alone, nothing learns
  mse, mae
  adaround              a row without figures: rounding is not learned
  brecq, qdrop          the nearest settings, and named so
  solve                 weights in closed form, nothing learns
  paper                 RepAPQ with the paper's settings
  repapq                RepAPQ with the defaults
Ablations (--method ablations, or one of them; --method all takes both):
  no-affine, no-stage-term, no-equalize, no-constants,
  mae-loss, by-unit, solve-first

Peers (--peer): onnxruntime, nncf and esp-ppq, each with its own defaults in an environment of its own, which uv makes
when it is first wanted. A peer gets the merged float network and the same calibration images, and is scored by the same
metric in the same run. A row says where a peer cannot do the scheme.

Written to the folder comparison in the work folder:

\b
  comparison.json       all rows
  comparison.csv        the same as a table
  comparison.html       all of it as a page, where its packages are there
  comparison.png, .svg  the first metric of each method
  networks/             of each row the calibrated network and its files

The same command goes on where it was interrupted: rows that are there are not made again.
"""

METHOD_HELP = "A method by its short name; repeatable. [default: all but ablations]"

PEER_HELP = "Another tool, or one of its ways: nncf, onnxruntime:entropy, esp-ppq:rounding. Repeatable."

SENSITIVITY_HELP = """\
Measure what each unit of CONFIG's model costs at each bit width, and choose the bits that fit a budget best.

One unit at a time is quantized, the rest stays float, and the network's output on calibration data is compared. Nothing
is learned. What the config pins (layer_bits, first_last_bits) stays so; `-q first_last_bits=None` frees the ends.

Any of the four budgets may be given, also together. The assignment of the least damage is found exactly, as an integer
programme. Damages of units add as squared errors do if they do not depend on each other. Without a budget units are
ranked only. Written to the work folder:

\b
  sensitivity.json      every unit at every width
  mixed_precision.py    CONFIG with the chosen bits: give it to
                        `repapq quantize` or to a test tool
  layer_bits.json       these bits alone, for Python and for
                        -q layer_bits="$(cat layer_bits.json)"
  checkpoint/           each measurement, until all is done; --resume
                        goes on with them, also with another budget
"""

DIAGNOSE_HELP = """\
Find out why CONFIG's model loses by quantization, and what helps.

Every unit is looked at with its branches, merged, with channels equalized and constants folded, and calibrated: the
largest value, kurtosis, the share of the range that the top 0.1 % use, and signal over noise, of the unit and of each
channel. Channels that stand out are named with the images that cause it. Remedies are named with their reason: fold
constants, equalize, more bits, keep float. Written to the work folder:

\b
  diagnosis.html        all of it as a page, with these images
  diagnosis.json        all figures, by unit, moment and channel
  checkpoint/           each finished part of the calibration, until all
                        is done; --resume goes on with them

With --file FILE.onnx nothing is calibrated. The file is run by onnxruntime, and each layer compared with the simulation
on the very input that the runtime gave it; the first one that computes something else is named.
"""

TARGETS_HELP = """\
List the targets that a network can be quantized for (`-q target=tensorrt`), or say all of one.
"""

CHECK_HELP = """\
Test the rules of a target on FILE, a quantized ONNX file, whoever made it.

Each finding names the node, the rule, what the target does to a file that breaks it, what to do, and where the rule is
published. Nothing is run.

Exit codes: 0 the file keeps all rules, 1 it breaks one.
"""

DOCTOR_HELP = """\
Say what is installed, what of it works together, which accelerators torch finds, and what to do about the rest.

Exit codes: 0 all that is installed works together, 1 something of it does not.
"""
