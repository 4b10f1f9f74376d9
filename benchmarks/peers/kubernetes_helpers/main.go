// Answers questions about pods and nodes with the code of Kubernetes: one JSON object per line, one answer per line.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	helpers "k8s.io/component-helpers/resource"
	"k8s.io/component-helpers/scheduling/corev1"
	"k8s.io/component-helpers/scheduling/corev1/nodeaffinity"
)

type question struct {
	Ask      string                `json:"ask"`
	Text     string                `json:"text"`
	Pod      *v1.Pod               `json:"pod"`
	Node     *v1.Node              `json:"node"`
	Selector *metav1.LabelSelector `json:"selector"`
	Labels   map[string]string     `json:"labels"`
}

func amounts(list v1.ResourceList) map[string]int64 {
	found := map[string]int64{}
	for name, quantity := range list {
		if name == v1.ResourceCPU {
			found[string(name)] = quantity.MilliValue()
		} else {
			found[string(name)] = quantity.Value()
		}
	}
	return found
}

func answer(each question) any {
	switch each.Ask {
	case "quantity":
		quantity, err := resource.ParseQuantity(each.Text)
		if err != nil {
			return nil
		}
		return []int64{quantity.MilliValue(), quantity.Value()}
	case "requests":
		return amounts(helpers.PodRequests(each.Pod, helpers.PodResourcesOptions{}))
	case "limits":
		return amounts(helpers.PodLimits(each.Pod, helpers.PodResourcesOptions{}))
	case "affinity":
		matches, err := nodeaffinity.GetRequiredNodeAffinity(each.Pod).Match(each.Node)
		return err == nil && matches
	case "taints":
		filters := func(taint *v1.Taint) bool {
			return taint.Effect == v1.TaintEffectNoSchedule || taint.Effect == v1.TaintEffectNoExecute
		}
		_, found := corev1.FindMatchingUntoleratedTaint(each.Node.Spec.Taints, each.Pod.Spec.Tolerations, filters)
		return !found
	case "selector":
		selector, err := metav1.LabelSelectorAsSelector(each.Selector)
		return err == nil && selector.Matches(labels.Set(each.Labels))
	}
	return "unknown question"
}

func main() {
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(make([]byte, 1<<20), 1<<26)
	out := bufio.NewWriter(os.Stdout)
	defer out.Flush()
	for lines.Scan() {
		var each question
		var found any = "not a question"
		if json.Unmarshal(lines.Bytes(), &each) == nil {
			found = answer(each)
		}
		text, _ := json.Marshal(found)
		fmt.Fprintln(out, string(text))
	}
}
