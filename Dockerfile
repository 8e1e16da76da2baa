# Serve a checkpoint's page on a CPU, or classify files. Any user may run it: nothing outside of /tmp is written.
#
#   docker build --tag hierarchical-clinicalbert .
#   docker run --rm --publish 7860:7860 --volume "$PWD/results/mine:/model:ro" hierarchical-clinicalbert
#   docker run --rm --user "$(id -u)" --volume "$PWD/results/mine:/model:ro" --volume "$PWD:/data" hierarchical-clinicalbert \
#       python predict.py --model /model --input /data/texts.csv --output /data/predictions.jsonl

FROM python:3.11-slim

WORKDIR /app

# what the page needs is all that predict.py needs
COPY space/requirements.txt space/
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu --requirement space/requirements.txt

COPY predict.py *_hierarchical.py ./
COPY hierarchical_clinicalbert hierarchical_clinicalbert
COPY space space

# code of checkpoints, and what is downloaded
ENV HF_HOME=/tmp/huggingface GRADIO_SERVER_NAME=0.0.0.0
EXPOSE 7860
USER nobody
CMD ["python", "space/app.py", "--model", "/model"]
